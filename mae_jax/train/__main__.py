"""Train what a config describes, or resume it: the same command does both.

    python train.py --config configs/pretrain.py:vit_b16 --workdir runs/x [--config.key=value ...]

Exit codes: 0 finished, or stopped on request with everything saved; 2 bad config or input;
3 aborted on NaN/Inf loss; 1 any other error.

With --distributed, or if JAX_COORDINATOR_ADDRESS, SLURM or Open MPI are set up, this is one process
of a multi-process run (docs/distributed.md).
"""

import sys
import traceback
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from mae_jax.train import overrides
from mae_jax.utils.errors import UserError

overrides.register_parsers()
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as in configs/pretrain.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and figures.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a run.")
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
    try:
        rest = flags.FLAGS(overrides.keep_last_config(argv))
        _ = CONFIG.value.items()  # raises for a missing config file
    except (AttributeError, KeyError) as error:
        _fail(f"no such config key: {_reason(error)}")
    except (flags.Error, UserError, IndexError, TypeError, ValueError, OSError) as error:
        _fail(_reason(error))
    return rest


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
