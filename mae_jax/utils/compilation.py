"""How XLA is set up: where it keeps compiled programs, and its flags."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("mae_jax.run")

# Flags of the train step by platform, and the only place that sets any. A flag comes in here with a
# measurement of its own: `python -m benchmarks.gpu_suite` tries the candidates on a GPU, which has
# not been done. On a CPU none was worth setting for a prototype of the step. What XLA_FLAGS in the
# environment says holds besides.
STEP_FLAGS: dict[str, dict[str, Any]] = {}


def train_step_compiler_options() -> dict[str, Any]:
    """Flags to compile the train step with; what is set is told."""
    found = STEP_FLAGS.get(jax.default_backend(), {})
    if found:
        log.info("XLA: %s", ", ".join(f"{name}={value}" for name, value in found.items()))
    return found


def enable_compilation_cache() -> None:
    """Keeps programs that took more than a second to compile, so that the next run starts faster.

    In ~/.cache/mae_jax (or below XDG_CACHE_HOME) unless JAX_COMPILATION_CACHE_DIR names another
    folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none. jax takes a program only for what it was
    compiled for: the same code, shapes, flags, version and kind of devices. Nothing is lost by
    deleting the folder.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(above) / "mae_jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
