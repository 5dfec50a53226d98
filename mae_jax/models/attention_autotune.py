"""Selection of the attention implementation of a device, by timing both when a run starts."""

import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.models.attention import AttentionImpl, AttentionShape, split_heads
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax.run")

CHOICES = ("auto", "xla", "cudnn")
CALLS, IMAGES = 8, 32  # passes per timed program, and images per pass
REPEATS = 5  # runs of the program; the fastest counts
MIN_SPEEDUP = 0.95  # cuDNN is selected below this fraction of XLA's time
TOLERANCE = 2e-2  # relative error allowed between results in bfloat16


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward and backward pass; infinite, with the reason, if it failed."""

    seconds: float
    failure: str = ""


def select_implementation(
    wanted: str,
    shapes: Collection[AttentionShape],
    dtype: Any,
    *,
    single_process: bool = False,
) -> AttentionImpl:
    """Select XLA or cuDNN for each attention shape; "auto" times both and takes the faster.

    cuDNN needs a GPU and bfloat16; elsewhere "auto" selects XLA without timing anything. All
    processes of a run must call this together and get the same result, unless `single_process`.

    Raises:
      UserError: `wanted` is unknown, or it is "cudnn" and that does not work here.
    """
    error = lambda problem: UserError(problem, key="model.attention", value=wanted)
    if wanted not in CHOICES:
        raise error(f"must be one of {', '.join(CHOICES)}")
    cudnn_possible = jax.default_backend() == "gpu" and dtype == jnp.bfloat16
    if wanted == "xla" or (wanted == "auto" and not cudnn_possible):
        return AttentionImpl()
    if not cudnn_possible:
        raise error(
            "needs a GPU and model.dtype='bfloat16'; this is "
            f"{jnp.dtype(dtype).name} on a {jax.default_backend()}. 'auto' takes what works"
        )
    timings = {
        shape: (time_xla(shape, dtype), time_cudnn(shape, dtype)) for shape in sorted(shapes)
    }
    seconds = np.array([[timing.seconds for timing in pair] for pair in timings.values()])
    if not single_process:
        seconds = _mean_over_processes(seconds)
    cudnn_shapes = []
    for (shape, (xla, cudnn)), (xla_s, cudnn_s) in zip(timings.items(), seconds):
        if wanted == "cudnn" and not math.isfinite(cudnn_s):
            reason = cudnn.failure or "it failed in another process"
            raise error(f"does not work for {_describe(shape)}: {reason}")
        if wanted == "cudnn" or cudnn_s < MIN_SPEEDUP * xla_s:
            cudnn_shapes.append(shape)
        log.info(
            "attention of %s: %s (xla %s, cudnn %s)",
            _describe(shape),
            "cudnn" if shape in cudnn_shapes else "xla",
            xla.failure or f"{1e3 * xla_s:.3f} ms",
            cudnn.failure or f"{1e3 * cudnn_s:.3f} ms",
        )
    return AttentionImpl(frozenset(cudnn_shapes))


def _mean_over_processes(seconds: np.ndarray) -> np.ndarray:
    """Average timings over processes, so that all of them select the same implementation."""
    seconds = seconds.astype(np.float32)
    gathered = multihost_utils.process_allgather(seconds)
    return np.asarray(gathered).reshape(-1, *seconds.shape).mean(axis=0)


def time_xla(shape: AttentionShape, dtype: Any) -> Timing:
    """Time XLA's attention."""
    return _timed_or_failed(lambda: _seconds(AttentionImpl(), shape, dtype))


def time_cudnn(shape: AttentionShape, dtype: Any) -> Timing:
    """Time cuDNN's attention; results or gradients that differ from XLA's are a failure."""
    cudnn = AttentionImpl(frozenset([shape]))

    def check_and_time() -> float:
        inputs = [x[0] for x in _inputs(shape, dtype)]
        actual, expected = (
            jax.jit(_forward_backward(attention, shape))(*inputs)
            for attention in (cudnn, AttentionImpl())
        )
        error = np.max([_relative_error(*pair) for pair in zip(actual, expected)])
        if not error <= TOLERANCE:  # also if it is NaN
            raise ArithmeticError(f"its results or gradients are off by {error:.1g}")
        return _seconds(cudnn, shape, dtype)

    return _timed_or_failed(check_and_time)


def _timed_or_failed(timed: Callable[[], float]) -> Timing:
    try:
        return Timing(timed())
    except Exception as problem:  # out of memory, missing library, old driver, unsupported shape
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return Timing(math.inf, lines[0][:200])


def _inputs(shape: AttentionShape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return random fused qkv projections [calls, images, t, 3d] and output gradients."""
    tokens, num_heads, width = shape
    rows, key = (CALLS, IMAGES, tokens), jax.random.key(0)
    qkv = jax.random.normal(key, (*rows, 3 * num_heads * width), dtype)
    return qkv, jax.random.normal(jax.random.fold_in(key, 1), (*rows, num_heads, width), dtype)


def _forward_backward(
    attention: AttentionImpl, shape: AttentionShape
) -> Callable[..., tuple[jax.Array, ...]]:
    def forward_backward(qkv, gradient):
        forward = lambda qkv: attention(*split_heads(qkv, shape[1]))
        result, vjp = jax.vjp(forward, qkv)
        return result, *vjp(gradient)

    return forward_backward


def _relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Return the norm of the difference over the norm of the expected array."""
    result, reference = (np.asarray(x, np.float32) for x in (actual, expected))
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def _seconds(attention: AttentionImpl, shape: AttentionShape, dtype: Any) -> float:
    """Return seconds per pass, timed over many passes in one program to hide dispatch overhead."""
    inputs, one_pass = _inputs(shape, dtype), _forward_backward(attention, shape)
    run = jax.jit(lambda *inputs: jax.lax.map(lambda each: one_pass(*each), inputs))
    jax.block_until_ready(run(*inputs))
    best = math.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        best = min(best, (time.perf_counter() - begin) / CALLS)
    return best


def _describe(shape: AttentionShape) -> str:
    tokens, num_heads, width = shape
    return f"{tokens} tokens, {num_heads} heads of {width}"
