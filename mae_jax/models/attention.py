"""Scaled dot-product attention (Vaswani et al. 2017): XLA, or a fused kernel for some shapes."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array
from jax.sharding import Mesh

from mae_jax.distributed.sharding import BATCH_SPEC
from mae_jax.models.tpu_attention import SUBLANES, tpu_attention

AttentionShape = tuple[int, int, int]  # tokens, number of heads, width of a head
FusedKernel = Literal["cudnn", "tpu", "xla"]


def attention_shape(tokens: int, width: int, num_heads: int) -> AttentionShape:
    """Return the shape of multi-head attention over tokens of an embedding dimension."""
    return tokens, num_heads, width // num_heads


@dataclass(frozen=True)
class AttentionImpl:
    """Attention implementation: a fused kernel for `fused_shapes`, XLA for other shapes.

    kernel: the fused kernel, `tpu_attention` or an implementation of
      `jax.nn.dot_product_attention`. The blocks add `padding` tokens, whose keys are masked:
      cuDNN's computes gradients only of even numbers of tokens, and TPUs copy matrices of tokens
      to those of images unless the tokens of an image fill registers.
    mesh: the devices of a sharded batch, for `tpu_attention`.
    """

    fused_shapes: frozenset[AttentionShape] = frozenset()
    kernel: FusedKernel = "cudnn"
    mesh: Mesh | None = None

    def padding(self, shape: AttentionShape) -> int:
        """Return the number of tokens to append to those of a shape."""
        if shape not in self.fused_shapes:
            return 0
        return -shape[0] % (SUBLANES if self.kernel == "tpu" else 2)

    def __call__(self, query: Array, key: Array, value: Array, tokens: int) -> Array:
        """Compute softmax(query @ key.T / sqrt(e)) @ value, all [b, t, h, e]; float32 softmax.

        Of the keys and values only the first `tokens` count.
        """
        if (tokens, *query.shape[2:]) not in self.fused_shapes:
            return _xla_attention(query, key, value)
        if self.kernel == "tpu":
            return self._tpu_attention(query, key, value, tokens)
        lengths = None
        if tokens < query.shape[1]:
            lengths = jnp.full(len(query), tokens, jnp.int32)
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=self.kernel
        )

    def _tpu_attention(self, query: Array, key: Array, value: Array, tokens: int) -> Array:
        """Run the kernel on every device's part of the batch: XLA cannot divide it."""
        if self.mesh and len(query) % self.mesh.size:  # one image, to initialize
            return _xla_attention(query, key[:, :tokens], value[:, :tokens])
        attend = partial(tpu_attention, num_heads=query.shape[2], num_keys=tokens)
        if self.mesh:
            attend = jax.shard_map(
                attend, mesh=self.mesh, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC, check_vma=False
            )
        merged = (rearrange(x, "b t h e -> b t (h e)") for x in (query, key, value))
        return attend(*merged).reshape(query.shape)


def _einsum_f32(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _xla_attention(query: Array, key: Array, value: Array) -> Array:
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array):
    """Normalize the softmax after the product with the values: [t, e] divisions, not [t, t]."""
    scores = _einsum_f32("bthe,bshe->bhts", query, key)
    scale = query.shape[-1] ** -0.5
    weights = jnp.exp(scale * (scores - scores.max(axis=-1, keepdims=True)))
    total = jnp.moveaxis(weights.sum(axis=-1), 1, 2)[..., None]
    weights = weights.astype(query.dtype)
    result = (_einsum_f32("bhts,bshe->bthe", weights, value) / total).astype(query.dtype)
    return result, (query, key, value, weights, total, result)


def _backward(saved, gradient: Array) -> tuple[Array, Array, Array]:
    """Compute the gradients of autodiff from fewer saved arrays, with matmuls in query.dtype."""
    query, key, value, weights, total, result = saved
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    gradient = gradient / total
    row_dot = (gradient * result.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    gradient = gradient.astype(dtype)
    dweights = _einsum_f32("bthe,bshe->bhts", gradient, value) - jnp.moveaxis(row_dot, 1, 2)
    dscores = (scale * weights * dweights).astype(dtype)
    dquery = _einsum_f32("bhts,bshe->bthe", dscores, key)
    dkey = _einsum_f32("bhts,bthe->bshe", dscores, query)
    dvalue = _einsum_f32("bhts,bthe->bshe", weights, gradient)
    return dquery.astype(dtype), dkey.astype(dtype), dvalue.astype(dtype)


_xla_attention.defvjp(_forward, _backward)
