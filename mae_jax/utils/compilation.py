"""XLA: the cache of compiled programs, and compiler flags."""

import logging
import os
from typing import Any

import jax

from mae_jax.utils.caches import cache_folder

log = logging.getLogger("mae_jax.run")

# XLA flags of the train step by backend and by kind of device, in addition to XLA_FLAGS in the
# environment. Add only flags with a benefit, measured or seen in the compiled program; on a CPU
# none had one.
STEP_FLAGS: dict[str, dict[str, Any]] = {
    # Products of queries, keys and values are not merged into one, which would have to be split.
    "gpu": {"xla_gpu_dot_merger_threshold_mb": 0},
    # Sharded weights are gathered, and their gradients summed, beside products of whole matrices: a
    # TPU would send parts of them in a loop with products of the parts, which take it longer.
    "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000},
    # A v5e sums gradients over chips, some MB at a time, beside the products of other blocks. Its
    # compiler refuses that for other TPUs.
    "TPU v5 lite": {
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_jf_crs_combiner_threshold_in_bytes": 4_000_000,
    },
}


def train_step_compiler_options(device_kind: str) -> dict[str, Any]:
    """Return the XLA flags of the train step on a kind of device, and log them."""
    options = STEP_FLAGS.get(jax.default_backend(), {}) | STEP_FLAGS.get(device_kind, {})
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
