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

from mae_jax.attention import Attend, Shape

log = logging.getLogger("mae_jax.run")

CHOICES = ("auto", "xla", "cudnn")
BATCH = 64  # images of a trial
REPEATS, CALLS = 5, 10  # of a trial; the best of the repeats counts
TOLERANCE = 2e-2  # relative, between results in bfloat16


@dataclass(frozen=True)
class Trial:
    """Seconds of one forward and backward pass; infinite, with the reason, where it failed."""

    seconds: float
    failure: str = ""


def choose(wanted: str, shapes: Collection[Shape], dtype: Any) -> Attend:
    """For each shape the faster implementation that works on this device; "auto" tries both.

    cuDNN takes bfloat16 on GPUs only; elsewhere there is nothing to choose and nothing is tried.
    All processes of a run have to call this together, and choose the same.

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
            "model.attention='cudnn' needs a GPU and model.dtype='bfloat16', not "
            f"{jax.default_backend()} and {jnp.dtype(dtype).name}; 'auto' takes what works"
        )
    trials = {shape: (try_xla(shape, dtype), try_cudnn(shape, dtype)) for shape in sorted(shapes)}
    seconds = _of_all_processes([[trial.seconds for trial in pair] for pair in trials.values()])
    fused = []
    for (shape, (_, cudnn)), (xla_seconds, cudnn_seconds) in zip(trials.items(), seconds):
        if wanted == "cudnn" and not math.isfinite(cudnn_seconds):
            why = cudnn.failure or "another process of this run says so"
            raise ValueError(f"model.attention='cudnn' does not work for {_said(shape)}: {why}")
        if wanted == "cudnn" or cudnn_seconds < xla_seconds:
            fused.append(shape)
        log.info(
            "attention of %s: %s (xla %.3f ms, cudnn %s)",
            _said(shape),
            "cudnn" if shape in fused else "xla",
            1e3 * xla_seconds,
            cudnn.failure or f"{1e3 * cudnn_seconds:.3f} ms",
        )
    return Attend(frozenset(fused))


def _of_all_processes(seconds: list[list[float]]) -> np.ndarray:
    """The sum over processes, so that all of them choose the same."""
    gathered = multihost_utils.process_allgather(np.array(seconds, np.float32))
    return np.asarray(gathered).reshape(-1, *np.shape(seconds)).sum(axis=0)


def try_xla(shape: Shape, dtype: Any) -> Trial:
    return _timed(Attend(), _inputs(shape, dtype))


def try_cudnn(shape: Shape, dtype: Any) -> Trial:
    """A trial that fails also where the results differ from XLA's."""
    inputs, fused = _inputs(shape, dtype), Attend(frozenset([shape]))
    try:
        found = _pass(fused)(*inputs)
        expected = _pass(Attend())(*inputs)
        error = max(map(_distance, found, expected))
    except Exception as problem:  # of a missing library, an old driver, a shape it does not take
        return Trial(math.inf, str(problem).strip().splitlines()[0][:200])
    if not error <= TOLERANCE:
        return Trial(math.inf, f"its results are off by {error:.1g}")
    return _timed(fused, inputs)


def _inputs(shape: Shape, dtype: Any) -> list[jax.Array]:
    """Queries, keys, values and a gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (BATCH, *shape), dtype) for key in keys]


def _pass(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    def both_ways(query, key, value, gradient):
        result, pull_back = jax.vjp(attend, query, key, value)
        return result, *pull_back(gradient)

    return jax.jit(both_ways)


def _distance(found: jax.Array, expected: jax.Array) -> float:
    """Relative to the expected array's norm."""
    result, wanted = (np.asarray(x, np.float32) for x in (found, expected))
    return float(np.linalg.norm(result - wanted) / np.linalg.norm(wanted))


def _timed(attend: Attend, inputs: list[jax.Array]) -> Trial:
    run = _pass(attend)
    jax.block_until_ready(run(*inputs))
    best = math.inf
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready([run(*inputs) for _ in range(CALLS)])
        best = min(best, (time.perf_counter() - begin) / CALLS)
    return Trial(best)


def _said(shape: Shape) -> str:
    tokens, heads, width = shape
    return f"{tokens} tokens, {heads} heads of {width}"
