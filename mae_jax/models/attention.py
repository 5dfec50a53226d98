"""Scaled dot-product attention (Vaswani et al. 2017): XLA or cuDNN, chosen per shape."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

AttentionShape = tuple[int, int, int]  # tokens, number of heads, width of a head


def attention_shape(tokens: int, width: int, num_heads: int) -> AttentionShape:
    """Return the shape of multi-head attention over tokens of an embedding dimension."""
    return tokens, num_heads, width // num_heads


def split_heads(qkv: Array, num_heads: int) -> tuple[Array, Array, Array]:
    """Split a fused projection [b, t, 3d] into queries, keys and values [b, t, h, e]."""
    query, key, value = (
        rearrange(x, "b t (h e) -> b t h e", h=num_heads) for x in jnp.split(qkv, 3, axis=-1)
    )
    return query, key, value


@dataclass(frozen=True)
class AttentionImpl:
    """Attention implementation: cuDNN's fused kernel for `cudnn_shapes`, XLA for other shapes."""

    cudnn_shapes: frozenset[AttentionShape] = frozenset()

    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        """Compute softmax(query @ key.T / sqrt(e)) @ value, all [b, t, h, e]; float32 softmax."""
        if query.shape[1:] in self.cudnn_shapes:
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return _xla_attention(query, key, value)


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
