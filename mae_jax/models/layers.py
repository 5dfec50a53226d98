"""The pre-norm transformer block (Dosovitskiy et al. 2021) and a stack of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from mae_jax.models.attention import AttentionImpl, split_heads
from mae_jax.models.mixed_precision_dense import mixed_precision_dense
from mae_jax.utils.pytree import Tree, flatten, unflatten

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class ExecutionConfig:
    """How a network is computed; none of this changes the layout of its parameters.

    dtype: of activations and matmul inputs; parameters, norms and softmax stay float32.
    remat: what the backward pass recomputes: "none", "dots" (all but matmuls) or "full".
    scan_unroll: blocks per iteration of the scan over depth; the depth itself means no loop.
    shard_activations: applied to batch-leading activations, to pin how they are sharded.
    attention: the implementation of attention.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int = 1
    shard_activations: Callable[[Array], Array] = lambda x: x
    attention: AttentionImpl = AttentionImpl()

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"model.remat={self.remat!r}; use one of {', '.join(REMAT_POLICIES)}")
        if self.scan_unroll < 1:
            raise ValueError(f"model.scan_unroll={self.scan_unroll} must be at least 1")


Layer = Callable[[Float[Array, "b t x"]], Float[Array, "b t y"]]


class Dense(nn.Module):
    """A linear layer with the reference's xavier-uniform kernel.

    Tokens are flattened to a matrix, which spares XLA a transposed copy in the backward pass. In
    a type other than float32 it takes the kernel from `cast_kernels`, if there are any.
    """

    features: int
    dtype: Any
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b t x"]) -> Float[Array, "b t y"]:
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        bias = self.param("bias", self.bias_init, (self.features,))
        rows = rearrange(x, "b t x -> (b t) x").astype(self.dtype)
        if self.dtype == jnp.float32:
            y = rows @ kernel + bias
        else:
            narrow = self.get_variable(LOW_PRECISION, "kernel", kernel.astype(self.dtype))
            y = mixed_precision_dense(rows, kernel, bias, narrow)
        return rearrange(y, "(b t) y -> b t y", b=x.shape[0])


LOW_PRECISION = "low_precision"  # the collection of `cast_kernels`


def cast_kernels(params: Tree, dtype: Any) -> dict[str, Any]:
    """{"low_precision": ...}: every kernel in the type of activations, to apply a network with.

    So each is converted once in a step, not at every use and again where blocks are recomputed.
    """
    leaves = flatten(jax.lax.stop_gradient(params))
    kernels = {n: x.astype(dtype) for n, x in leaves.items() if n.endswith("/kernel")}
    return {} if dtype == jnp.float32 else {LOW_PRECISION: unflatten(kernels)}


def layer_norm(name: str, eps: float, dtype: Any) -> Layer:
    """Layer normalisation, computed in float32 whatever the dtype it takes and gives."""
    layer = nn.remat(nn.LayerNorm, prevent_cse=False)
    return layer(eps, dtype=dtype, use_fast_variance=False, name=name)


class Intermediates(NamedTuple):
    """What one block does, or with a leading axis what each does.

    tokens: that it gives; attention: of the first token, cls, to every one, mean over the heads.
    """

    tokens: Float[Array, "*depth b t d"]
    attention: Float[Array, "*depth b t"]


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    With `return_intermediates` it also gives the first token's attention weights, mean over the heads.
    """

    num_heads: int
    execution: ExecutionConfig
    return_intermediates: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t"] | None]:
        width, dtype = x.shape[-1], self.execution.dtype
        # As in the reference: qkv is one xavier-initialised (d, 3d) matrix, laid out q, k, v.
        qkv = Dense(3 * width, dtype, name="qkv")(x)
        q, k, v = split_heads(qkv, self.num_heads)
        x = self.execution.attention(q, k, v)
        x = Dense(width, dtype, name="proj")(rearrange(x, "b t h e -> b t (h e)"))
        if not self.return_intermediates:
            return x, None
        scores = jnp.einsum("bhe,bthe->bht", q[:, 0], k).astype(jnp.float32)
        return x, jax.nn.softmax(scores * q.shape[-1] ** -0.5).mean(axis=1)


@partial(jax.checkpoint, prevent_cse=False)
def gelu(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The exact GELU, computed in float32; of it the backward pass keeps nothing but x.

    As in the reference: by erf, not by flax's default tanh (nor by erfc, which takes a CPU longer).
    """
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1.0 + jax.lax.erf(exact * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
    """Two layers around a GELU."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = Dense(self.hidden, self.dtype, name="fc1")(x)
        hidden = gelu(hidden)
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)


def mlp_dim(width: int, mlp_ratio: float) -> int:
    """Hidden features of an MLP."""
    return int(width * mlp_ratio + 1e-6)  # 29 / 49 * 49 comes out a hair below 29


class DropPath(NamedTuple):
    """Stochastic depth (Huang et al. 2016) of one block, or with a leading axis of each.

    keep: probability that a branch stays; noise: in [0, 1), for attention and for the MLP.
    """

    keep: Float[Array, "*depth"]
    noise: Float[Array, "*depth 2 b"]

    def __call__(self, x: Float[Array, "b t d"], branch: int) -> Float[Array, "b t d"]:
        """The branch of each image, scaled up so that its mean stays, or dropped."""
        # As in the reference: floor(keep + u), which at keep = 1 is always 1.
        kept = jnp.floor(self.keep + self.noise[branch]) / self.keep
        return (x * kept[:, None, None]).astype(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `drop_path` may drop either addend."""

    num_heads: int
    mlp_ratio: float
    layer_norm_eps: float
    execution: ExecutionConfig
    return_intermediates: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], drop_path: DropPath | None
    ) -> tuple[Float[Array, "b t d"], Intermediates | None]:
        dtype, shard_activations = self.execution.dtype, self.execution.shard_activations
        hidden = mlp_dim(x.shape[-1], self.mlp_ratio)
        x = shard_activations(x)
        y = layer_norm("norm1", self.layer_norm_eps, dtype)(x)
        y, attention = Attention(
            self.num_heads, self.execution, self.return_intermediates, name="attn"
        )(y)
        x = x + (drop_path(y, 0) if drop_path else y)
        y = layer_norm("norm2", self.layer_norm_eps, dtype)(x)
        y = Mlp(hidden, dtype, name="mlp")(y)
        x = shard_activations(x + (drop_path(y, 1) if drop_path else y))
        return x, None if attention is None else Intermediates(x, attention)


def make_blocks(
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    layer_norm_eps: float,
    execution: ExecutionConfig,
    return_intermediates: bool = False,
) -> Callable[..., tuple[Float[Array, "b t d"], Intermediates | None]]:
    """`depth` blocks as one scanned module named "blocks", its parameters stacked [depth, ...].

    It takes tokens [b, t, d] and, where paths are dropped, a `DropPath` with one row per block.
    """
    block = Block
    if execution.remat != "none":
        # Inside a loop XLA cannot undo rematerialisation; without one it has to be told not to.
        block = nn.remat(
            Block,
            policy=REMAT_POLICIES[execution.remat],
            prevent_cse=execution.scan_unroll >= depth,
        )
    blocks = nn.scan(
        block,
        variable_axes={"params": 0, LOW_PRECISION: 0},
        split_rngs={"params": True},
        length=depth,
        unroll=min(execution.scan_unroll, depth),
    )(num_heads, mlp_ratio, layer_norm_eps, execution, return_intermediates, name="blocks")
    return lambda x, drop_path=None: blocks(x, drop_path)
