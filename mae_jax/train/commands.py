"""The command `mae-jax`: subcommands, each a module that is imported only when it is run.

mae-jax SUBCOMMAND ARGUMENTS... does the same as python -m MODULE ARGUMENTS...
"""

import argparse
import importlib
import sys
from typing import NamedTuple

import mae_jax


class Command(NamedTuple):
    """A subcommand: its module, one line of help, and the module's function that takes `argv`."""

    module: str
    help: str
    function: str = "main"


COMMANDS = {
    "train": Command("mae_jax.train.__main__", "train a recipe or config file, or resume a run"),
    "evaluate": Command("mae_jax.evaluate.__main__", "k-NN, linear and other probes of features"),
    "features": Command("mae_jax.features", "write the features of images to a .npz file"),
    "predict": Command("mae_jax.predict", "predict the classes of images"),
    "reconstruct": Command("mae_jax.reconstruct", "draw the reconstructions of masked images"),
    "convert": Command(
        "mae_jax.convert.__main__", "convert weights: mae_jax, official, Hugging Face, timm"
    ),
    "inspect": Command("mae_jax.convert.__main__", "describe a checkpoint", "inspect"),
    "data": Command("mae_jax.data.__main__", "check, stats, prepare or cache a dataset"),
}


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = _parser().parse_args(sys.argv[1:2])
    name, rest = arguments.command, sys.argv[2:]
    sys.argv = [f"mae-jax {name}", *rest]  # the name of the program in usage and errors
    module = importlib.import_module(COMMANDS[name].module)
    if name == "train":
        module.run()
    else:
        from mae_jax.utils import cli  # imports jax, which `mae-jax --help` can do without

        cli.run_command(getattr(module, COMMANDS[name].function))


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the first argument."""
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
        commands.add_parser(name, help=command.help, add_help=False)
    return parser
