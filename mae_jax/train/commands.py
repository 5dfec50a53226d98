"""The command `mae-jax`: subcommands, each a module that is imported only when it is run.

mae-jax SUBCOMMAND ARGUMENTS... does the same as python -m MODULE ARGUMENTS...
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import mae_jax


class Command(NamedTuple):
    """A subcommand: its module, one line of help, and the names of two functions of the module.

    `function` takes `argv`, and `parser` returns an argparse parser without running anything.
    """

    module: str
    help: str
    function: str = "main"
    parser: str = "build_parser"


COMMANDS = {
    "train": Command("mae_jax.train.__main__", "train a recipe or config file, or resume a run"),
    "evaluate": Command("mae_jax.evaluate.__main__", "k-NN, linear and other probes of features"),
    "features": Command("mae_jax.features", "write the features of images, and draw them"),
    "similar": Command(
        "mae_jax.evaluate.similar", "find the images most similar to others, or near-duplicates"
    ),
    "predict": Command("mae_jax.predict", "predict the classes of images, or of their pixels"),
    "reconstruct": Command("mae_jax.reconstruct", "draw the reconstructions of masked images"),
    "convert": Command(
        "mae_jax.convert.__main__", "convert weights: mae_jax, official, Hugging Face, timm"
    ),
    "inspect": Command(
        "mae_jax.convert.__main__", "describe a checkpoint", "inspect", "build_inspect_parser"
    ),
    "export": Command("mae_jax.convert.export", "write a StableHLO or ONNX file for serving"),
    "push": Command("mae_jax.convert.push", "prepare a folder for the Hugging Face hub"),
    "compare": Command("mae_jax.train.compare", "compare the results and curves of runs"),
    "data": Command("mae_jax.data.__main__", "check, stats, score, prepare or cache a dataset"),
    "demo": Command("mae_jax.train.__main__", "pretrain on a few photographs, in minutes"),
    "completion": Command(
        "mae_jax.train.commands",
        "print a script for shell completion",
        "print_completion",
        "build_completion_parser",
    ),
}
DEMO_FLAGS = ["--config=demo", "--workdir=runs/demo"]


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = _make_parser().parse_args(sys.argv[1:2])
    name, flags = arguments.command, sys.argv[2:]
    if name == "demo":
        if {"--help", "-h"} & set(flags):
            print(f"mae-jax demo runs mae-jax train {' '.join(DEMO_FLAGS)}; later flags override\n")
        flags = [*DEMO_FLAGS, *flags]
    sys.argv = [f"mae-jax {name}", *flags]  # the name of the program in usage and errors
    module = importlib.import_module(COMMANDS[name].module)
    if name in ("train", "demo"):
        module.run()
    else:
        from mae_jax.utils import cli  # imports jax, which `mae-jax --help` can do without

        cli.run_command(getattr(module, COMMANDS[name].function))


def _make_parser(
    parents: Callable[[Command], list[argparse.ArgumentParser]] = lambda command: [],
) -> argparse.ArgumentParser:
    """Return the parser of the subcommands, each with the flags of its parents."""
    parser = argparse.ArgumentParser(
        prog="mae-jax",
        usage="mae-jax SUBCOMMAND ...",
        description=mae_jax.__doc__,
        epilog="`mae-jax SUBCOMMAND --help` lists the flags of a subcommand.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mae_jax {mae_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, parents=parents(command), add_help=False)
    return parser


def build_completion_parser() -> argparse.ArgumentParser:
    """Return the parser of `mae-jax completion`."""
    from mae_jax.utils import cli

    description = "Print a script for shell completion; the README says where it belongs."
    parser = cli.make_parser("mae_jax.train.commands", description)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def print_completion(argv: list[str]) -> None:
    """Print the script that completes subcommands, flags, config keys and files."""
    import shtab

    shell = build_completion_parser().parse_args(argv).shell
    parser = _make_parser(lambda command: [_with_files(_build_parser(command))])
    print(shtab.complete(parser, shell))


def _build_parser(command: Command) -> argparse.ArgumentParser:
    return getattr(importlib.import_module(command.module), command.parser)()


def _with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return a parser whose paths are completed as files."""
    import shtab

    from mae_jax.convert.locate import checkpoint_argument
    from mae_jax.utils import cli

    for action in parser._actions:
        if action.type in (cli.path_argument, cli.path_text, cli.dataset_text, checkpoint_argument):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _with_files(subparser)
    return parser
