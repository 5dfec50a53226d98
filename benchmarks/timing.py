"""Times of single computations, for the other benchmarks.

Inputs are random, never zeros: products of zeros draw less power, and so run faster.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
from jaxtyping import Array, Key

REPEATS = 5  # measurements, of which the median counts
LONGEST_CALL = 0.002  # seconds of work that one call has at least, where memory allows


def random_arrays(
    key: Key[Array, ""], shapes: Sequence[tuple[int, ...]], dtype: Any
) -> list[Array]:
    """Normally distributed arrays, one of each shape."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def copies_for(flops: float, assumed: float, bytes_each: int, most_bytes: float = 4e9) -> int:
    """How many independent copies of a computation one call has, so that starting it costs little.

    assumed: FLOP/s. At least 2, so that inputs rotate; at most 16, or as many as memory takes.
    """
    wanted = math.ceil(LONGEST_CALL * assumed / flops)
    return max(2, min(16, wanted, int(most_bytes // bytes_each)))


def seconds_each(
    function: Callable[..., Any],
    inputs: Sequence[Sequence[Array]],
    seconds: float,
    compiler_options: dict[str, Any] | None = None,
) -> float:
    """Median seconds of one application of a function to one of the inputs.

    One call applies the function to every input and gives all results, so that nothing is left out
    and the host does not set the pace. Each of REPEATS measurements is as many calls as take about
    `seconds`, and ends when the last result is there.
    """

    def every(inputs: Sequence[Sequence[Array]]) -> list[Any]:
        return [function(*arrays) for arrays in inputs]

    call = jax.jit(every).lower(inputs).compile(compiler_options)

    def measure(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            result = call(inputs)
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    measure(2)  # the first calls load kernels
    calls = max(1, math.ceil(seconds / measure(1)))
    return median(measure(calls) for _ in range(REPEATS)) / calls / len(inputs)
