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

from mae_jax.attention import Attend, Shape, split_heads

log = logging.getLogger("mae_jax.run")

CHOICES = ("auto", "xla", "cudnn")
CALLS, IMAGES = 8, 32  # of a trial: passes in one program, over so many images each
REPEATS = 5  # of a trial; the fastest counts
MARGIN = 0.95  # share of XLA's time below which cuDNN is taken
TOLERANCE = 2e-2  # relative, between results in bfloat16


@dataclass(frozen=True)
class Trial:
    """Seconds of one forward and backward pass; infinite, with the reason, where it failed."""

    seconds: float
    failure: str = ""


def choose(wanted: str, shapes: Collection[Shape], dtype: Any, *, alone: bool = False) -> Attend:
    """For each shape the faster implementation that works on this device; "auto" tries both.

    cuDNN takes bfloat16 on GPUs only; elsewhere there is nothing to choose and nothing is tried.
    Unless a process does so `alone`, all of a run have to call this together, and choose the same.

    Raises:
      ValueError: `wanted` is "cudnn", which does not work here, or it is not known.
    """
    if wanted not in CHOICES:
        raise ValueError(f"model.attention={wanted!r}; use one of {', '.join(CHOICES)}")
    possible = jax.default_backend() == "gpu" and dtype == jnp.bfloat16
    if wanted == "xla" or not (possible or wanted == "cudnn"):
        return Attend()
    if not possible:
        raise ValueError(
            "model.attention='cudnn' needs a GPU and model.dtype='bfloat16'; this is "
            f"{jnp.dtype(dtype).name} on a {jax.default_backend()}. 'auto' takes what works"
        )
    trials = {shape: (try_xla(shape, dtype), try_cudnn(shape, dtype)) for shape in sorted(shapes)}
    seconds = np.array([[trial.seconds for trial in pair] for pair in trials.values()], np.float32)
    if not alone:  # the mean over processes, so that all of them choose the same
        gathered = multihost_utils.process_allgather(seconds)
        seconds = np.asarray(gathered).reshape(-1, *seconds.shape).mean(axis=0)
    fused = []
    for (shape, (xla, cudnn)), (of_xla, of_cudnn) in zip(trials.items(), seconds):
        if wanted == "cudnn" and not math.isfinite(of_cudnn):
            why = cudnn.failure or "another process of this run says so"
            raise ValueError(f"model.attention='cudnn' does not work for {_said(shape)}: {why}")
        if wanted == "cudnn" or of_cudnn < MARGIN * of_xla:
            fused.append(shape)
        log.info(
            "attention of %s: %s (xla %s, cudnn %s)",
            _said(shape),
            "cudnn" if shape in fused else "xla",
            xla.failure or f"{1e3 * of_xla:.3f} ms",
            cudnn.failure or f"{1e3 * of_cudnn:.3f} ms",
        )
    return Attend(frozenset(fused))


def try_xla(shape: Shape, dtype: Any) -> Trial:
    return _tried(lambda: _seconds(Attend(), shape, dtype))


def try_cudnn(shape: Shape, dtype: Any) -> Trial:
    """A trial that fails also where the results differ from XLA's."""
    fused = Attend(frozenset([shape]))

    def trial() -> float:
        inputs = [x[0] for x in _inputs(shape, dtype)]
        found, expected = (
            jax.jit(_both_ways(attend, shape))(*inputs) for attend in (fused, Attend())
        )
        error = np.max([_distance(*pair) for pair in zip(found, expected)])  # nan if one is
        if not error <= TOLERANCE:
            raise ArithmeticError(f"its results or gradients are off by {error:.1g}")
        return _seconds(fused, shape, dtype)

    return _tried(trial)


def _tried(trial: Callable[[], float]) -> Trial:
    try:
        return Trial(trial())
    except Exception as problem:  # of memory, a missing library, an old driver, a shape
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return Trial(math.inf, lines[0][:200])


def _inputs(shape: Shape, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Queries, keys and values packed as in the model, and gradients."""
    tokens, heads, width = shape
    rows, key = (CALLS, IMAGES, tokens), jax.random.key(0)
    packed = jax.random.normal(key, (*rows, 3 * heads * width), dtype)
    return packed, jax.random.normal(jax.random.fold_in(key, 1), (*rows, heads, width), dtype)


def _both_ways(attend: Attend, shape: Shape) -> Callable[..., tuple[jax.Array, ...]]:
    def both_ways(packed, gradient):
        forward = lambda packed: attend(*split_heads(packed, shape[1]))
        result, pull_back = jax.vjp(forward, packed)
        return result, *pull_back(gradient)

    return both_ways


def _distance(found: jax.Array, expected: jax.Array) -> float:
    """Relative to the expected array's norm."""
    result, wanted = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))


def _seconds(attend: Attend, shape: Shape, dtype: Any) -> float:
    """Of one pass: many in one program, so that it is not the host that is timed."""
    inputs, one_pass = _inputs(shape, dtype), _both_ways(attend, shape)
    run = jax.jit(lambda *inputs: jax.lax.map(lambda each: one_pass(*each), inputs))
    jax.block_until_ready(run(*inputs))
    best = math.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        best = min(best, (time.perf_counter() - begin) / CALLS)
    return best


def _said(shape: Shape) -> str:
    tokens, heads, width = shape
    return f"{tokens} tokens, {heads} heads of {width}"
