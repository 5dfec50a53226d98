"""Fused attention for TPUs, in Pallas: scores and weights stay in the vector memory of a core.

Sequences are short: a kernel holds all queries, keys and values of an image, and the backward pass
computes the weights again. Arrays are [b, t, d], with the heads next to each other in d, as the
linear layers before and after have them: nothing is transposed in device memory.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # of a float32 vector register
BLOCK_BYTES = 7 * 2**20  # of vector memory for the arrays of a kernel, of at least 16 MB


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def tpu_attention(
    query: Array, key: Array, value: Array, num_heads: int, num_keys: int, interpret: bool = False
) -> Array:
    """Compute softmax(query @ key.T / sqrt(e)) @ value of every head, all [b, t, h * e].

    Products take the dtype of the inputs and add up in float32; the softmax is float32.

    Args:
      num_keys: only the first of the keys and values count.
      interpret: run as XLA operations, on any device.
    """
    return _forward(query, key, value, num_heads, num_keys, interpret)[0]


def _forward(query, key, value, num_heads, num_keys, interpret):
    inputs = (query, key, value)
    [result] = _call(_forward_kernel, inputs, 1, num_heads, num_keys, interpret)
    return result, inputs


def _backward(num_heads, num_keys, interpret, saved, gradient):
    inputs = (*saved, gradient)
    return tuple(_call(_backward_kernel, inputs, 3, num_heads, num_keys, interpret))


tpu_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    inputs: tuple[Array, ...],
    num_outputs: int,
    num_heads: int,
    num_keys: int,
    interpret: bool,
) -> Sequence[Array]:
    """Run a kernel on blocks of some images and some heads, which are whole registers wide."""
    batch, tokens, width = inputs[0].shape
    head = width // num_heads
    columns = math.lcm(head, LANES)
    if width % columns:
        columns = width
    buffers = 2 * (len(inputs) + num_outputs)  # blocks are copied while others are computed
    image_bytes = buffers * tokens * columns * inputs[0].dtype.itemsize
    images = max(1, min(batch, BLOCK_BYTES // image_bytes))
    while batch % images:
        images -= 1
    block = pl.BlockSpec((images, tokens, columns), lambda i, j: (i, 0, j))
    products = 2 if num_outputs == 1 else 5
    matrices = batch * num_heads
    registers = math.ceil(tokens / SUBLANES) * math.ceil(tokens / LANES)
    return pl.pallas_call(
        partial(kernel, head=head, num_keys=num_keys),
        grid=(batch // images, width // columns),
        in_specs=[block] * len(inputs),
        out_specs=[block] * num_outputs,
        out_shape=[jax.ShapeDtypeStruct(inputs[0].shape, inputs[0].dtype)] * num_outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * matrices * tokens * tokens * head,
            transcendentals=matrices * registers * SUBLANES * LANES,
            bytes_accessed=(len(inputs) + num_outputs) * inputs[0].nbytes,
        ),
        interpret=interpret,
        name=f"tpu_attention{kernel.__name__}",
    )(*inputs)


def _forward_kernel(
    query: Any, key: Any, value: Any, result: Any, *, head: int, num_keys: int
) -> None:
    def attend(at: tuple[Any, ...]) -> None:
        weights, total = _weights(query[at], key[at], num_keys)
        transposed = _product(value[at], weights.astype(value.dtype), 0, 0) / total
        result[at] = transposed.T.astype(result.dtype)

    _for_each_head(attend, query, head)


def _backward_kernel(query, key, value, gradient, dquery, dkey, dvalue, *, head, num_keys) -> None:
    def differentiate(at: tuple[Any, ...]) -> None:
        dtype = query.dtype
        weights, total = _weights(query[at], key[at], num_keys)
        weights = weights / total
        dweights = _product(value[at], gradient[at], 1, 1)
        dscores = weights * (dweights - (weights * dweights).sum(axis=0, keepdims=True))
        dscores = (dscores * head**-0.5).astype(dtype)
        dquery[at] = _product(dscores, key[at], 0, 0).astype(dtype)
        dkey[at] = _product(dscores, query[at], 1, 0).astype(dtype)
        dvalue[at] = _product(weights.astype(dtype), gradient[at], 1, 0).astype(dtype)

    _for_each_head(differentiate, query, head)


def _for_each_head(function: Callable[[tuple[Any, ...]], None], block: Any, head: int) -> None:
    """Call a function with the index of every head of every image of a block."""

    def image(number: Any, _: None) -> None:
        for start in range(0, block.shape[2], head):
            function((number, slice(None), pl.ds(start, head)))

    jax.lax.fori_loop(0, block.shape[0], image, None)


def _weights(query: Array, key: Array, num_keys: int) -> tuple[Array, Array]:
    """Return exp(scores - max) [s, t] of keys and queries, float32, and its sums [1, t].

    Keys are rows: maxima and sums then need no reduction within a register. The weights of those
    from `num_keys` on are 0.
    """
    scores = _product(key, query, 1, 1) * query.shape[1] ** -0.5
    if num_keys < len(key):
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        scores = jnp.where(row < num_keys, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=0, keepdims=True))
    return weights, weights.sum(axis=0, keepdims=True)


def _product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contract an axis of each of two matrices; the result is float32."""
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
