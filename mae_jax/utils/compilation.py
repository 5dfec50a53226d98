"""XLA: the cache of compiled programs, and compiler flags."""

import logging
import os
from typing import Any

import jax

from mae_jax.utils.caches import cache_folder

log = logging.getLogger("mae_jax.run")

# XLA flags of the train step by backend, in addition to XLA_FLAGS in the environment. Add only
# flags with a benefit, measured or seen in the compiled program; on a CPU none had one.
STEP_FLAGS: dict[str, dict[str, Any]] = {
    # Products of queries, keys and values are not merged into one, which would have to be split.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
    # Gradients are summed over chips in parts of some MB, beside the products of earlier blocks.
    "tpu": {
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_jf_crs_combiner_threshold_in_bytes": 4_000_000,
    },
}


def train_step_compiler_options() -> dict[str, Any]:
    """Return the XLA flags of the train step, and log them."""
    options = STEP_FLAGS.get(jax.default_backend(), {})
    if options:
        log.info("XLA: %s", ", ".join(f"{name}={value}" for name, value in options.items()))
    return options


def enable_compilation_cache() -> None:
    """Cache programs that take more than a second to compile, so that the next run starts faster.

    The cache is in `cache_folder`, or JAX_COMPILATION_CACHE_DIR, which may be an address that jax
    supports; JAX_ENABLE_COMPILATION_CACHE=false disables it. Programs are cached by code, shapes,
    flags, jax version and type of device. The folder can be deleted at any time.
    """
    if (folder := jax.config.jax_compilation_cache_dir) and folder.startswith("~"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = cache_folder("compiled")
    if folder is None:
        log.info("no cache of compiled programs: no folder for it can be written")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
