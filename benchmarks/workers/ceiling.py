"""What the device can do at best: a large matrix product, and a copy."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SECONDS = 0.3  # that each of the repetitions takes at least
REPETITIONS = 5


def measure(dtype: Any) -> dict[str, Any]:
    """FLOP/s of a square product, and bytes per second that a copy reads and writes together.

    The product is of random numbers, since zeros cost less power. On a GPU it is of bfloat16 and
    8192 x 8192; on a CPU of the benchmark's dtype and 2048 x 2048, with float32 results, for which
    XLA has its best kernels there.
    """
    on_cpu = jax.default_backend() == "cpu"
    side, out = (2048, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    dtype = dtype if on_cpu else jnp.bfloat16
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=out))
    source = jax.random.normal(jax.random.key(2), (2**25 if on_cpu else 2**28,))
    negated = jax.jit(jnp.negative)
    return {
        "flops_per_s": 2 * side**3 / _seconds(product, a, b),
        "matmul": f"{side} x {side}, {jnp.dtype(dtype).name}",
        "copy_bytes_per_s": 2 * source.nbytes / _seconds(negated, source),
    }


def _seconds(function: Callable[..., Array], *arguments: Array) -> float:
    """Of one call: the least over repetitions of many."""
    jax.block_until_ready(function(*arguments))
    calls, taken = 1, []
    while len(taken) < REPETITIONS:
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        seconds = time.perf_counter() - begin
        if seconds < SECONDS:
            calls *= 2
        else:
            taken.append(seconds / calls)
    return min(taken)
