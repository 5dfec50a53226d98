"""Trains what a config describes, or continues to: the same command does both.

    python train.py --config configs/pretrain.py:vit_b16 --workdir runs/x [--config.key=value ...]

Exit codes: 0 finished, or stopped on request with everything saved; 2 bad config or input;
3 halted by losses that are not finite numbers; 1 anything else.

With --distributed, or where JAX_COORDINATOR_ADDRESS, SLURM or Open MPI say so, this is one process
of several that train together (docs/distributed.md).
"""

import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as in configs/pretrain.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; overrides are written --config.key=value")
    import jax

    from mae_jax.data.sources import DataError
    from mae_jax.data.worker_processes import WorkerError
    from mae_jax.distributed import processes
    from mae_jax.distributed.checkpoint_reader import CheckpointError
    from mae_jax.distributed.checkpointer import CheckpointSaveError
    from mae_jax.train import trainer
    from mae_jax.train.fault_tolerance import NonFiniteError
    from mae_jax.train.workdir import WorkdirError
    from mae_jax.utils import console
    from mae_jax.utils.compilation import enable_compilation_cache

    console.setup_logging()
    enable_compilation_cache()
    try:
        processes.initialize(DISTRIBUTED.value)
    except ValueError as error:
        _fail(str(error))
    if not processes.is_main():
        console.quiet_secondary_process(jax.process_index())
    try:
        trainer.train_and_evaluate(CONFIG.value, Path(WORKDIR.value or ""))
    except (trainer.ConfigError, DataError, WorkdirError, CheckpointError) as error:
        _fail("" if processes.already_reported(error) else str(error))
    except (WorkerError, OSError) as error:  # the latter of a full disk, for one
        _fail(str(error), code=1)
    except CheckpointSaveError as error:  # whose threads may still write
        _fail(str(error), code=1, at_once=True)
    except NonFiniteError as error:
        _fail(str(error) if processes.is_main() else "", code=3)
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        _fail(
            f"process {jax.process_index()} of {jax.process_count()} failed as told above, or has "
            "lost one that did; the others end with it. Start all of them again: the run continues "
            "from its last checkpoint",
            code=1,
        )


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        _ = CONFIG.value.items()  # a config file that is missing shows only now
    except (AttributeError, KeyError) as error:
        _fail(f"no such config key: {_reason(error)}")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        _fail(_reason(error))
    return rest


def _reason(error: BaseException) -> str:
    """The sentence of an error from the depths of flag parsing, without quotes and traceback."""
    while isinstance(error.args[0] if error.args else None, BaseException):
        error = error.args[0]
    text = str(error.args[0] if error.args else error)
    if "Traceback" in text:
        text = text.strip().splitlines()[-1]
    return text


def _fail(message: str, code: int = 2, *, at_once: bool = False) -> NoReturn:
    from mae_jax.distributed import processes

    if message:
        print(f"error: {message}", file=sys.stderr)
    processes.shutdown(code, at_once=at_once)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
