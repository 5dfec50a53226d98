"""Memory of computations on CPUs."""

import ctypes
import os
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from malloc.h of glibc


def keep_freed_memory_on_cpu() -> bool:
    """Let glibc keep freed memory, if jax computes on CPUs; return whether it does.

    The temporary memory of a step is one block. By default glibc returns it to Linux after every
    step, which clears its pages again in the next. Call it before jax creates its devices. Other
    C libraries, and settings of glibc in the environment, are left alone.
    """
    if not _is_glibc() or _is_configured():
        return False
    # Steps that are dispatched ahead would each allocate a block, and freed ones would be split.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu":
        return False
    libc = ctypes.CDLL(None)
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # one heap, whose end is never returned
    return all(libc.mallopt(name, value) for name, value in settings.items())


def _is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def _is_configured() -> bool:
    return any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
