"""XLA: the cache of compiled programs, and compiler flags."""

import logging
import os
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger("mae_jax.run")

# XLA flags of the train step by backend, in addition to XLA_FLAGS in the environment. Add only
# flags with a benefit, measured or seen in the compiled program; on a CPU none had one.
STEP_FLAGS: dict[str, dict[str, Any]] = {
    # Products of queries, keys and values are not merged into one, which would have to be split.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
}


def train_step_compiler_options() -> dict[str, Any]:
    """Return the XLA flags of the train step, and log them."""
    options = STEP_FLAGS.get(jax.default_backend(), {})
    if options:
        log.info("XLA: %s", ", ".join(f"{name}={value}" for name, value in options.items()))
    return options


def enable_compilation_cache() -> None:
    """Cache programs that take more than a second to compile, so that the next run starts faster.

    The cache is ~/.cache/mae_jax (or below XDG_CACHE_HOME), or JAX_COMPILATION_CACHE_DIR;
    JAX_ENABLE_COMPILATION_CACHE=false disables it. Programs are cached by code, shapes, flags, jax
    version and type of device. The folder can be deleted at any time.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_home) / "mae_jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.info("no cache of compiled programs: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
