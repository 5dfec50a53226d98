"""Which implementation of attention a device is given: chosen by a trial when a run starts."""

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

log = logging.getLogger("mae_jax.run")

CHOICES = ("auto", "xla", "cudnn")
CALLS, IMAGES = 8, 32  # of a trial: passes in one program, over so many images each
REPEATS = 5  # of a trial; the fastest counts
MIN_SPEEDUP = 0.95  # share of XLA's time below which cuDNN is taken
TOLERANCE = 2e-2  # relative, between results in bfloat16


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward and backward pass; infinite, with the reason, where it failed."""

    seconds: float
    failure: str = ""


def select_implementation(
    wanted: str, shapes: Collection[AttentionShape], dtype: Any, *, single_process: bool = False
) -> AttentionImpl:
    """For each shape the faster implementation that works on this device; "auto" tries both.

    cuDNN takes bfloat16 on GPUs only; elsewhere there is nothing to choose and nothing is tried.
    Unless a process does so (`single_process`), all of a run have to call this together, and choose the same.

    Raises:
      ValueError: `wanted` is "cudnn", which does not work here, or it is not known.
    """
    if wanted not in CHOICES:
        raise ValueError(f"model.attention={wanted!r}; use one of {', '.join(CHOICES)}")
    possible = jax.default_backend() == "gpu" and dtype == jnp.bfloat16
    if wanted == "xla" or not (possible or wanted == "cudnn"):
        return AttentionImpl()
    if not possible:
        raise ValueError(
            "model.attention='cudnn' needs a GPU and model.dtype='bfloat16'; this is "
            f"{jnp.dtype(dtype).name} on a {jax.default_backend()}. 'auto' takes what works"
        )
    trials = {shape: (time_xla(shape, dtype), time_cudnn(shape, dtype)) for shape in sorted(shapes)}
    seconds = np.array([[trial.seconds for trial in pair] for pair in trials.values()], np.float32)
    if not single_process:  # the mean over processes, so that all of them choose the same
        gathered = multihost_utils.process_allgather(seconds)
        seconds = np.asarray(gathered).reshape(-1, *seconds.shape).mean(axis=0)
    cudnn_shapes = []
    for (shape, (xla, cudnn)), (of_xla, of_cudnn) in zip(trials.items(), seconds):
        if wanted == "cudnn" and not math.isfinite(of_cudnn):
            why = cudnn.failure or "another process of this run says so"
            raise ValueError(f"model.attention='cudnn' does not work for {_describe(shape)}: {why}")
        if wanted == "cudnn" or of_cudnn < MIN_SPEEDUP * of_xla:
            cudnn_shapes.append(shape)
        log.info(
            "attention of %s: %s (xla %s, cudnn %s)",
            _describe(shape),
            "cudnn" if shape in cudnn_shapes else "xla",
            xla.failure or f"{1e3 * of_xla:.3f} ms",
            cudnn.failure or f"{1e3 * of_cudnn:.3f} ms",
        )
    return AttentionImpl(frozenset(cudnn_shapes))


def time_xla(shape: AttentionShape, dtype: Any) -> Timing:
    return _timed_or_failed(lambda: _seconds(AttentionImpl(), shape, dtype))


def time_cudnn(shape: AttentionShape, dtype: Any) -> Timing:
    """A trial that fails also where the results differ from XLA's."""
    cudnn_shapes = AttentionImpl(frozenset([shape]))

    def trial() -> float:
        inputs = [x[0] for x in _inputs(shape, dtype)]
        found, expected = (
            jax.jit(_forward_backward(attention, shape))(*inputs)
            for attention in (cudnn_shapes, AttentionImpl())
        )
        error = np.max([_distance(*pair) for pair in zip(found, expected)])  # nan if one is
        if not error <= TOLERANCE:
            raise ArithmeticError(f"its results or gradients are off by {error:.1g}")
        return _seconds(cudnn_shapes, shape, dtype)

    return _timed_or_failed(trial)


def _timed_or_failed(trial: Callable[[], float]) -> Timing:
    try:
        return Timing(trial())
    except Exception as problem:  # of memory, a missing library, an old driver, a shape
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return Timing(math.inf, lines[0][:200])


def _inputs(shape: AttentionShape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Queries, keys and values packed as in the model, and gradients."""
    tokens, heads, width = shape
    rows, key = (CALLS, IMAGES, tokens), jax.random.key(0)
    packed = jax.random.normal(key, (*rows, 3 * heads * width), dtype)
    return packed, jax.random.normal(jax.random.fold_in(key, 1), (*rows, heads, width), dtype)


def _forward_backward(
    attention: AttentionImpl, shape: AttentionShape
) -> Callable[..., tuple[jax.Array, ...]]:
    def both_ways(packed, gradient):
        forward = lambda packed: attention(*split_heads(packed, shape[1]))
        result, pull_back = jax.vjp(forward, packed)
        return result, *pull_back(gradient)

    return both_ways


def _distance(found: jax.Array, expected: jax.Array) -> float:
    """Relative to the expected array's norm."""
    result, wanted = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))


def _seconds(attention: AttentionImpl, shape: AttentionShape, dtype: Any) -> float:
    """Of one pass: many in one program, so that it is not the host that is timed."""
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
    tokens, heads, width = shape
    return f"{tokens} tokens, {heads} heads of {width}"
