"""Selection of the attention implementation of a device, which is tried when a run starts."""

import logging
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.models.attention import AttentionImpl, AttentionShape, FusedKernel
from mae_jax.models.tpu_attention import SUBLANES
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax.run")

CHOICES = ("auto", "xla", "cudnn")
MIN_CAPABILITY = (8, 0)  # CUDA compute capability that cuDNN's fused attention needs (Ampere)
IMAGES = 8  # of the trial
TOLERANCE = 2e-2  # relative error allowed between results in bfloat16


def select_implementation(
    wanted: str,
    shapes: Collection[AttentionShape],
    dtype: Any,
    *,
    single_process: bool = False,
) -> AttentionImpl:
    """Select XLA or a fused kernel for each attention shape.

    "auto" selects, in bfloat16, cuDNN on a CUDA GPU of compute capability 8.0 or higher and
    `tpu_attention` on a TPU, for every shape that passes a trial: it runs, and results and
    gradients agree with XLA's. All processes of a run must call this together and get the same
    result, unless `single_process`.

    Raises:
      UserError: `wanted` is unknown, or it is "cudnn" and that does not work here.
    """
    error = lambda problem: UserError(problem, key="model.attention", value=wanted)
    if wanted not in CHOICES:
        raise error(f"must be one of {', '.join(CHOICES)}")
    kernel = _fused_kernel(dtype)
    if wanted == "xla" or (wanted == "auto" and not kernel):
        return AttentionImpl()
    if kernel is None or (wanted == "cudnn" and kernel != "cudnn"):
        raise error(
            "needs an NVIDIA GPU of compute capability 8.0 or higher and model.dtype='bfloat16'; "
            f"this is {jnp.dtype(dtype).name} on {jax.devices()[0].device_kind}. "
            "'auto' takes what works"
        )
    ordered = sorted(shapes)
    failures = [try_fused(shape, dtype, kernel) for shape in ordered]
    passed = np.array([not failure for failure in failures])
    if not single_process:
        passed = _passed_everywhere(passed)
    for shape, failure, works in zip(ordered, failures, passed):
        if works:
            continue
        problem = (
            f"does not work for {_describe(shape)}: {failure or 'it failed in another process'}"
        )
        if wanted == "cudnn":
            raise error(problem)
        log.warning("fused attention %s; XLA's slower attention is used", problem)
    fused = frozenset(shape for shape, works in zip(ordered, passed) if works)
    if fused:
        shown = "; ".join(map(_describe, sorted(fused)))
        log.info("fused attention (%s) of %s", "cuDNN" if kernel == "cudnn" else "Pallas", shown)
    return AttentionImpl(fused, kernel)


def _fused_kernel(dtype: Any) -> FusedKernel | None:
    """Return the fused kernel for this device, None if there is none."""
    if dtype != jnp.bfloat16:
        return None
    if jax.default_backend() == "tpu":
        return "tpu"
    return "cudnn" if _compute_capability() >= MIN_CAPABILITY else None


def _compute_capability() -> tuple[int, ...]:
    """Return the CUDA compute capability, as (9, 0); () for other devices."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    parts = str(capability).split(".")
    return tuple(map(int, parts)) if all(map(str.isdecimal, parts)) else ()


def _passed_everywhere(passed: np.ndarray) -> np.ndarray:
    """Return which shapes passed the trial in all processes."""
    gathered = multihost_utils.process_allgather(passed)
    return np.asarray(np.asarray(gathered).reshape(-1, *passed.shape).all(axis=0))


def try_fused(shape: AttentionShape, dtype: Any, kernel: FusedKernel = "cudnn") -> str:
    """Run the fused kernel forward and backward; return what failed, "" if nothing did.

    Results or gradients that differ from XLA's are a failure.
    """
    try:
        actual = _outputs_and_gradients(AttentionImpl(frozenset([shape]), kernel), shape, dtype)
        expected = _outputs_and_gradients(AttentionImpl(), shape, dtype)
        error = np.max([_relative_error(*pair) for pair in zip(actual, expected)])
        if not error <= TOLERANCE:  # also if it is NaN
            raise ArithmeticError(f"its results or gradients are off by {error:.1g}")
    except Exception as problem:  # missing library, old driver, unsupported shape
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return lines[0][:200]
    return ""


def _outputs_and_gradients(
    attention: AttentionImpl, shape: AttentionShape, dtype: Any
) -> tuple[np.ndarray, ...]:
    """Return the output [b, t, h, e] for random inputs, and the gradients of query, key, value.

    All are padded to whole registers of a TPU: gradients of padding must be 0.
    """
    tokens = shape[0]
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, gradient = (jax.random.normal(key, (IMAGES, *shape), dtype) for key in keys)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -tokens % SUBLANES), (0, 0), (0, 0)))

    @jax.jit
    def run(inputs, gradient):
        def forward(*qkv):
            padded = tokens + attention.padding(shape)
            query, key, value = (x[:, :padded] for x in qkv)
            return pad(attention(query, key, value, tokens)[:, :tokens])

        output, vjp = jax.vjp(forward, *map(pad, inputs))
        return output, *vjp(pad(gradient))

    return tuple(np.asarray(x, np.float32) for x in run(inputs, gradient))


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of the expected array."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _describe(shape: AttentionShape) -> str:
    tokens, num_heads, width = shape
    return f"{tokens} tokens, {num_heads} heads of {width}"
