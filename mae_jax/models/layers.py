"""The pre-norm transformer block (Dosovitskiy et al. 2021) and a stack of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from mae_jax.models.attention import AttentionImpl, attention_shape
from mae_jax.models.gelu import gelu
from mae_jax.models.mixed_precision_dense import mixed_precision_dense
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import Tree, flatten, unflatten

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class ExecutionConfig:
    """How a network is computed; the parameters and their shapes do not depend on it.

    dtype: of activations and matmul inputs (mixed precision); parameters, norms and softmax stay
      float32.
    remat: rematerialization (activation checkpointing): what the backward pass recomputes, "none",
      "dots" (all but matmuls) or "full".
    scan_unroll: blocks per iteration of the loop over depth; None, or at least the depth, means no
      loop, which spares copies of saved activations.
    shard_activations: applied to activations with a leading batch axis, to pin their sharding.
    attention: attention implementation.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    scan_unroll: int | None = 1
    shard_activations: Callable[[Array], Array] = lambda x: x
    attention: AttentionImpl = AttentionImpl()

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            problem = f"must be one of {', '.join(REMAT_POLICIES)}"
            raise UserError(problem, key="model.remat", value=self.remat)
        if self.scan_unroll is not None and self.scan_unroll < 1:
            raise UserError("must be at least 1", key="model.scan_unroll", value=self.scan_unroll)


Layer = Callable[[Float[Array, "b t x"]], Float[Array, "b t y"]]


class Dense(nn.Module):
    """A linear layer over tokens, with the reference's Xavier-uniform kernel.

    Tokens are flattened to a matrix, which spares XLA a transposed copy in the backward pass. In
    low precision the cast kernel comes from the collection of `make_variables`, if that is given.
    """

    features: int
    dtype: Any
    bias_init: Any = nn.initializers.zeros

    def __call__(self, x: Float[Array, "b t x"]) -> Float[Array, "b t y"]:
        return self._project(x, parts=1)[0]

    def split(self, x: Float[Array, "b t x"], parts: int) -> list[Float[Array, "b t y"]]:
        """Return the features in equal parts.

        Accelerators compute a product for each, which spares copies; a CPU is faster with one.
        """
        if jax.default_backend() == "cpu":
            return jnp.split(self(x), parts, axis=-1)
        return self._project(x, parts)

    @nn.compact
    def _project(self, x: Any, parts: int) -> list[Any]:
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        bias = self.param("bias", self.bias_init, (self.features,))
        rows = rearrange(x, "b t x -> (b t) x").astype(self.dtype)
        if self.dtype == jnp.float32:
            columns = zip(jnp.split(kernel, parts, axis=1), jnp.split(bias, parts))
            outputs: list[Array] = [rows @ kernel + bias for kernel, bias in columns]
        else:
            cast_kernel = self.get_variable(LOW_PRECISION, "kernel", kernel.astype(self.dtype))
            outputs = mixed_precision_dense(rows, kernel, bias, cast_kernel, parts)
        return [rearrange(y, "(b t) y -> b t y", b=x.shape[0]) for y in outputs]


LOW_PRECISION = "low_precision"  # flax collection of cast kernels


def make_variables(params: Tree, dtype: Any) -> dict[str, Any]:
    """Return the variables to apply a network to: its parameters in the form that computes fastest.

    Once per step, for all blocks and both passes, norms are folded and kernels are cast.
    """
    if jax.default_backend() != "cpu":  # with its small batches, passes over weights take longer
        with jax.named_scope("fold_norms"):
            params = fold_norms(params)
    with jax.named_scope("cast_kernels"):
        return {"params": params, **cast_kernels(params, dtype)}


def cast_kernels(params: Tree, dtype: Any) -> dict[str, Any]:
    """Return the collection of kernels in the dtype of activations; {} for float32."""
    leaves = flatten(jax.lax.stop_gradient(params))
    kernels = {n: x.astype(dtype) for n, x in leaves.items() if n.endswith("/kernel")}
    return {} if dtype == jnp.float32 else {LOW_PRECISION: unflatten(kernels)}


def fold_norms(params: Tree) -> Tree:
    """Fold scale and bias of the norms of all blocks into the linear layers after them.

    The network computes the same with the result. The gradients of scale and bias then come from
    those of weights, without sums over the tokens, which take a GPU longer.
    """
    leaves = flatten(params)
    for norm, layer in (("norm1", "attn/qkv"), ("norm2", "mlp/fc1")):
        suffix = f"{layer}/kernel"
        for block in [n.removesuffix(suffix) for n in leaves if n.endswith(f"blocks/{suffix}")]:
            kernel, scale = leaves[block + suffix], leaves[f"{block}{norm}/scale"]
            bias = leaves[f"{block}{norm}/bias"]
            leaves[block + suffix] = scale[..., None] * kernel
            leaves[f"{block}{layer}/bias"] += jnp.einsum("lx,lxy->ly", bias, kernel)
            leaves[f"{block}{norm}/scale"] = jnp.ones_like(scale)
            leaves[f"{block}{norm}/bias"] = jnp.zeros_like(bias)
    return unflatten(leaves)


def layer_norm(name: str, eps: float, dtype: Any) -> Layer:
    """Return a layer normalization that computes in float32; input and output have `dtype`.

    The variance is the mean of squared deviations; for bfloat16 on TPUs E[x^2] - E[x]^2, which
    reads x once less, and whose rounding is small beside that of x. The backward pass has x only; a
    GPU computes the statistics again, since to save those of ViT-H it takes a kernel more.
    """
    backend = jax.default_backend()
    fast = dtype == jnp.bfloat16 and backend == "tpu"
    layer = nn.remat(nn.LayerNorm, prevent_cse=backend == "gpu")
    return layer(eps, dtype=dtype, use_fast_variance=fast, name=name)


class Intermediates(NamedTuple):
    """Intermediate outputs of one block, or of all blocks, stacked along a leading axis.

    tokens: output of the block; attention: weights of the class tokens (the first) over all tokens,
    mean over class tokens and heads; head_attention: of every head, mean over class tokens.
    """

    tokens: Float[Array, "*depth b t d"]
    attention: Float[Array, "*depth b t"]
    head_attention: Float[Array, "*depth b h t"]


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    Tokens from `num_tokens` on are padding. With `return_intermediates` it also returns the
    attention weights of the class tokens, the first ones: see `Intermediates`.
    """

    num_heads: int
    num_tokens: int
    class_tokens: int
    execution: ExecutionConfig
    return_intermediates: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t d"], tuple[Float[Array, "b n"], Float[Array, "b h n"]] | None]:
        width, dtype = x.shape[-1], self.execution.dtype
        # As in the reference: qkv is one Xavier-initialized (d, 3d) matrix, in the order q, k, v.
        qkv = Dense(3 * width, dtype, name="qkv").split(x, 3)
        q, k, v = (rearrange(y, "b t (h e) -> b t h e", h=self.num_heads) for y in qkv)
        x = self.execution.attention(q, k, v, self.num_tokens)
        x = Dense(width, dtype, name="proj")(rearrange(x, "b t h e -> b t (h e)"))
        if not self.return_intermediates:
            return x, None
        k = k[:, : self.num_tokens]
        queries = [q[:, i] for i in range(self.class_tokens)]
        scores = jnp.stack([jnp.einsum("bhe,bthe->bht", query, k) for query in queries])
        weights = jax.nn.softmax(scores.astype(jnp.float32) * q.shape[-1] ** -0.5).mean(axis=0)
        return x, (weights.mean(axis=1), weights)


class Mlp(nn.Module):
    """Two linear layers with a GELU in between."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        hidden = Dense(self.hidden, self.dtype, name="fc1")(x)
        hidden = gelu(hidden)
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)


def mlp_dim(width: int, mlp_ratio: float) -> int:
    """Return the hidden width of an MLP."""
    return int(width * mlp_ratio + 1e-6)  # rounding: 29 / 49 * 49 is slightly below 29


class DropPath(NamedTuple):
    """Drop path (stochastic depth, Huang et al. 2016) of one block, or stacked over all blocks.

    keep_prob: probability that a residual branch is kept; noise: uniform in [0, 1), for the
    attention branch and for the MLP branch of every image.
    """

    keep_prob: Float[Array, "*depth"]
    noise: Float[Array, "*depth 2 b"]

    def __call__(self, x: Float[Array, "b t d"], branch: int) -> Float[Array, "b t d"]:
        """Drop the branch of some images; scale it by 1 / keep_prob for the others."""
        # As in the reference: floor(keep_prob + noise), which is always 1 for keep_prob = 1.
        factor = jnp.floor(self.keep_prob + self.noise[branch]) / self.keep_prob
        return (x * factor[:, None, None]).astype(x.dtype)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)), both with drop path."""

    num_heads: int
    num_tokens: int
    class_tokens: int
    mlp_ratio: float
    layer_norm_eps: float
    execution: ExecutionConfig
    return_intermediates: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], drop_path: DropPath | None
    ) -> tuple[Float[Array, "b t d"], Intermediates | None]:
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        hidden = mlp_dim(x.shape[-1], self.mlp_ratio)
        x = shard(x)
        y = layer_norm("norm1", self.layer_norm_eps, dtype)(x)
        y, attention = Attention(
            self.num_heads,
            self.num_tokens,
            self.class_tokens,
            self.execution,
            self.return_intermediates,
            name="attn",
        )(y)
        x = x + (drop_path(y, 0) if drop_path else y)
        y = layer_norm("norm2", self.layer_norm_eps, dtype)(x)
        y = Mlp(hidden, dtype, name="mlp")(y)
        x = shard(x + (drop_path(y, 1) if drop_path else y))
        return x, None if attention is None else Intermediates(x, *attention)


def apply_blocks(
    x: Float[Array, "b t d"],
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    layer_norm_eps: float,
    execution: ExecutionConfig,
    *,
    drop_path: DropPath | None = None,
    class_tokens: int = 1,
    return_intermediates: bool = False,
) -> tuple[Float[Array, "b t d"], Intermediates | None]:
    """Apply `depth` blocks, one scanned module "blocks" with parameters [depth, ...].

    Returns tokens and, if asked for, the stacked intermediates.
    """
    block, unroll = Block, min(execution.scan_unroll or depth, depth)
    if execution.remat != "none":
        # XLA undoes rematerialization by common subexpression elimination, except in a loop.
        block = nn.remat(
            Block,
            policy=REMAT_POLICIES[execution.remat],
            prevent_cse=unroll == depth,
        )
    blocks = nn.scan(
        block,
        variable_axes={"params": 0, LOW_PRECISION: 0},
        split_rngs={"params": True},
        length=depth,
        unroll=unroll,
        # Symbolic batch sizes would fail the check; without it, a seed has other weights.
        check_constancy_invariants=isinstance(x.shape[0], int),
    )
    tokens = x.shape[1]
    padding = execution.attention.padding(attention_shape(tokens, x.shape[2], num_heads))
    x, intermediates = blocks(
        num_heads,
        tokens,
        class_tokens,
        mlp_ratio,
        layer_norm_eps,
        execution,
        return_intermediates,
        name="blocks",
    )(jnp.pad(x, ((0, 0), (0, padding), (0, 0))), drop_path)
    if intermediates is not None:
        intermediates = intermediates._replace(tokens=intermediates.tokens[:, :, :tokens])
    return x[:, :tokens], intermediates
