"""Trains what a config describes, or continues to: the same command does both.

    python train.py --config configs/pretrain.py:vit_b16 --workdir runs/x [--config.key=value ...]

Exit codes: 0 finished, or stopped on request with everything saved; 2 bad config or input;
3 halted by a loss that is not a finite number; 1 anything else.
"""

import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as in configs/pretrain.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]!r}; overrides are written --config.key=value")
    from mae_jax import console, experiment
    from mae_jax.checkpoint import CheckpointError
    from mae_jax.data.sources import DataError
    from mae_jax.data.workers import WorkerError
    from mae_jax.health import NonFiniteError

    console.setup_logging()
    try:
        experiment.run(CONFIG.value, Path(WORKDIR.value or ""))
    except (experiment.ConfigError, DataError, CheckpointError) as error:
        _fail(str(error))
    except WorkerError as error:
        _fail(str(error), code=1)
    except NonFiniteError as error:
        _fail(str(error), code=3)


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


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
