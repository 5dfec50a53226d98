"""Train what a config describes, or resume it: the same command does both.

    mae-jax train --config pretrain:vit_b16 --workdir runs/x [--config.key=value ...]

`mae-jax demo` stands for `mae-jax train --config demo --workdir runs/demo`.

Exit codes: 0 finished, or stopped on request with everything saved; 2 bad config or input;
3 aborted on NaN/Inf loss; 1 any other error.

With --distributed, or if JAX_COORDINATOR_ADDRESS, SLURM or Open MPI are set up, this is one process
of a multi-process run (docs/distributed.md).
"""

import argparse
import sys
import traceback
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from mae_jax.train import overrides, recipes
from mae_jax.utils import cli
from mae_jax.utils.errors import UserError

overrides.register_parsers()
HELP = {
    "config": "a recipe, as pretrain:vit_b16, or a config file, as my.py:ARGUMENT",
    "workdir": "folder for checkpoints, metrics and figures",
    "distributed": "join the other processes of a run",
}
CONFIG = config_flags.DEFINE_config_file("config", None, HELP["config"])
WORKDIR = flags.DEFINE_string("workdir", None, HELP["workdir"])
DISTRIBUTED = flags.DEFINE_bool("distributed", False, HELP["distributed"])
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Run the command; never returns after an error."""
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; overrides are written --config.key=value")
    if not WORKDIR.value:
        _fail("--workdir is empty")
    import jax

    from mae_jax.data.worker_processes import WorkerError
    from mae_jax.distributed import processes
    from mae_jax.distributed.checkpointer import CheckpointSaveError
    from mae_jax.train.config import from_config_dict
    from mae_jax.train.fault_tolerance import NonFiniteError
    from mae_jax.train.trainer import train_and_evaluate
    from mae_jax.utils import console
    from mae_jax.utils.compilation import enable_compilation_cache
    from mae_jax.utils.host_memory import keep_freed_memory_on_cpu

    console.setup_logging()
    enable_compilation_cache()
    try:
        processes.initialize(DISTRIBUTED.value)
        keep_freed_memory_on_cpu()
        if not processes.is_main():
            console.quiet_secondary_process(jax.process_index())
        train_and_evaluate(from_config_dict(CONFIG.value), WORKDIR.value)
    except UserError as error:
        _fail("" if processes.already_reported(error) else str(error))
    except (WorkerError, OSError) as error:  # OSError: a full disk, for example
        _fail(str(error), code=1)
    except CheckpointSaveError as error:  # its threads may still be writing
        _fail(str(error), code=1, immediate=True)
    except NonFiniteError as error:
        _fail(str(error) if processes.is_main() else "", code=3)
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        _fail(
            f"process {jax.process_index()} of {jax.process_count()} failed with the error above, "
            "or lost a process that failed; all of them exit. Start all of them again: the run "
            "resumes from its last checkpoint",
            code=1,
        )


def parse_flags(argv: list[str]) -> list[str]:
    """Parse the flags; bad ones print one sentence and exit with code 2."""
    if {"--help", "-h", "-help"} & set(argv):
        build_parser().print_help()
        sys.exit(0)
    try:
        rest = flags.FLAGS(overrides.keep_last_config(argv))
        _ = CONFIG.value.items()  # raises for a missing config file
    except (AttributeError, KeyError) as error:
        bad_key = overrides.explain_bad_key(argv)
        _fail(bad_key or f"no such config key: {_reason(error)}")
    except (flags.Error, UserError, IndexError, TypeError, ValueError, OSError) as error:
        _fail(overrides.explain_bad_key(argv) or _reason(error))
    return rest


def build_parser() -> argparse.ArgumentParser:
    """Return a parser of all flags, for help and for shell completion; absl parses them."""
    from mae_jax.train.config import Config
    from mae_jax.train.config_schema import declared_keys

    parser = cli.make_parser("mae_jax.train", __doc__)
    parser.description, parser.usage = __doc__, "%(prog)s --config CONFIG --workdir WORKDIR [...]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", metavar="CONFIG", choices=recipes.names(), help=HELP["config"])
    parser.add_argument("--workdir", type=cli.path_argument, help=HELP["workdir"])
    parser.add_argument("--distributed", action="store_true", help=HELP["distributed"])
    keys = parser.add_argument_group("config keys")
    for name, key in declared_keys(Config()).items():
        meaning = str(key["meaning"]).replace("%", "%%")
        choices = key["choices"] or None
        keys.add_argument(f"--config.{name}", metavar="VALUE", choices=choices, help=meaning)
    return parser


def _reason(error: BaseException) -> str:
    """Return the message of a nested flag-parsing error, without quotes and traceback."""
    while isinstance(error.args[0] if error.args else None, BaseException):
        error = error.args[0]
    text = str(error.args[0] if error.args else error)
    if "Traceback" in text:
        text = text.strip().splitlines()[-1]
    return text


def _fail(message: str, code: int = 2, *, immediate: bool = False) -> NoReturn:
    from mae_jax.distributed import processes

    if message:
        print(f"error: {message}", file=sys.stderr)
    processes.shutdown(code, immediate=immediate)


def run() -> None:
    """Run the command on the arguments of the process."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    run()
