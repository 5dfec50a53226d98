"""The encoder: a Vision Transformer that sees only the patches that it is given."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mae_jax.models.layers import (
    Dense,
    DropPath,
    ExecutionConfig,
    Intermediates,
    apply_blocks,
    layer_norm,
)
from mae_jax.models.patches import gather_patches, sincos_pos_embed_2d
from mae_jax.models.variants import VitVariant
from mae_jax.utils.errors import UserError

POS_EMBEDS = ("sincos", "learned", "learned_random")


class PosEmbed(nn.Module):
    """Position embedding of the class tokens (first) and of every patch, [1, t, d].

    "sincos" is fixed and has no parameter; "learned" is a parameter initialized from it,
    "learned_random" one initialized as Pixio's.
    """

    kind: str
    grid: tuple[int, int]
    width: int
    class_tokens: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 t d"]:
        if self.kind == "learned_random":
            # As in the reference: N(0, 0.02); its truncation at 100 standard deviations is none.
            shape = 1, self.class_tokens + self.grid[0] * self.grid[1], self.width
            return self.param("table", nn.initializers.normal(0.02), shape)
        table = jnp.asarray(sincos_pos_embed_2d(self.width, self.grid, self.class_tokens)[None])
        if self.kind == "sincos":
            return table
        return self.param("table", lambda _: table)


def _uniform_bias(fan_in: int):
    # As in the reference: the patch embedding keeps torch's default convolution bias.
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return nn.initializers.uniform(2 * bound)(key, shape, dtype) - bound

    return init


class Encoder(nn.Module):
    """ViT over the kept patches (paper section 3, "MAE encoder"); see `make_encoder`.

    grid: rows and columns of patches; class_tokens: their number, each with a position of its own;
    pos_embed: one of `POS_EMBEDS`; drop_path: rate of stochastic depth in the last block, rising
    linearly from 0 in the first.

    Parameters: patch_embed, cls_token, pos_embed (if learned), blocks (stacked over depth), norm
    (if `final_norm`).
    """

    width: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    class_tokens: int = 1
    mlp_ratio: float = 4.0
    pos_embed: str = "sincos"
    layer_norm_eps: float = 1e-6
    final_norm: bool = True
    drop_path: float = 0.0
    execution: ExecutionConfig = ExecutionConfig()

    def __call__(
        self,
        patches: Float[Array, "b n p"],
        ids_keep: Int[Array, "b k"] | None = None,
        drop_path_noise: Float[Array, "depth 2 b"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Encode the class tokens, first, and the patches at `ids_keep` (None: all, in order).

        `drop_path_noise`, uniform in [0, 1), turns on drop path; axis 1 is attention and MLP.
        """
        return self._encode(patches, ids_keep, drop_path_noise)[0]

    def global_feature(self, patches: Float[Array, "b n p"]) -> Float[Array, "b d"]:
        """Return the vector of an image that k-NN compares, float32, from all its patches.

        With one class token it is the mean of the patch tokens. With several it is, as in Pixio's
        k-NN evaluation, the mean of the class tokens before the final norm.
        """
        tokens, unnormed, _ = self._encode(patches, None, None)
        return self.pool_globally(tokens, unnormed)

    def with_global_feature(
        self,
        patches: Float[Array, "b n p"],
        drop_path_noise: Float[Array, "depth 2 b"] | None = None,
        *,
        return_intermediates: bool = False,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"], Intermediates | None]:
        """Encode every patch; return tokens, `global_feature`, and intermediates if asked for."""
        tokens, unnormed, intermediates = self._encode(
            patches, None, drop_path_noise, return_intermediates=return_intermediates
        )
        return tokens, self.pool_globally(tokens, unnormed), intermediates

    def pool_globally(
        self, tokens: Float[Array, "b t d"], unnormed: Float[Array, "b t d"]
    ) -> Float[Array, "b d"]:
        """Return the global feature of tokens after and before the final norm."""
        if self.class_tokens == 1:
            return tokens[:, 1:].astype(jnp.float32).mean(axis=1)
        return unnormed[:, : self.class_tokens].astype(jnp.float32).mean(axis=1)

    @nn.compact
    def _encode(
        self,
        patches: Any,
        ids_keep: Any,
        drop_path_noise: Any,
        *,
        return_intermediates: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Return the tokens after and before the final norm, and the intermediates or None."""
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        count = self.class_tokens
        positions = PosEmbed(self.pos_embed, self.grid, self.width, count, name="pos_embed")()
        cls_positions, positions = positions[:, :count], positions[:, count:]
        if ids_keep is not None:
            # Embedding only the kept patches gives the same result as embedding all, then dropping.
            patches = shard(gather_patches(patches, ids_keep))
            positions = jnp.take(positions[0], ids_keep, axis=0)
        embed = Dense(self.width, dtype, _uniform_bias(patches.shape[-1]), name="patch_embed")
        x = embed(patches)
        # Positions and cls are cast per image: so their gradients are summed in float32.
        x = shard(x + jnp.broadcast_to(positions, x.shape).astype(dtype))
        # As in the reference: cls and mask tokens are N(0, 0.02), not truncated.
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, count, self.width))
        cls = jnp.broadcast_to(cls + cls_positions, (x.shape[0], count, self.width)).astype(dtype)
        drop_path = None
        if drop_path_noise is not None:
            rates = jnp.linspace(0.0, self.drop_path, self.depth)
            drop_path = DropPath(1.0 - rates, drop_path_noise)
        x, intermediates = apply_blocks(
            jnp.concatenate([cls, x], axis=1),
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            self.layer_norm_eps,
            self.execution,
            drop_path=drop_path,
            class_tokens=count,
            return_intermediates=return_intermediates,
        )
        unnormed = x
        if self.final_norm:
            norm = layer_norm("norm", self.layer_norm_eps, dtype)
            x = norm(x)
            if intermediates is not None:
                intermediates = intermediates._replace(tokens=norm(intermediates.tokens))
        return x, unnormed, intermediates


def make_encoder(
    variant: VitVariant,
    grid: tuple[int, int],
    *,
    pos_embed: str = "sincos",
    layer_norm_eps: float = 1e-6,
    final_norm: bool = True,
    drop_path: float = 0.0,
    execution: ExecutionConfig = ExecutionConfig(),
) -> Encoder:
    """Return the encoder of a variant for images of `grid` rows and columns of patches.

    Raises:
      UserError: the variant is not a valid ViT or `pos_embed` is unknown.
    """
    check_width("model.width", variant.width, variant.heads)
    if variant.class_tokens < 1:
        raise UserError("must be at least 1", key="model.class_tokens", value=variant.class_tokens)
    if pos_embed not in POS_EMBEDS:
        problem = f"must be one of {', '.join(POS_EMBEDS)}"
        raise UserError(problem, key="model.position", value=pos_embed)
    return Encoder(
        variant.width,
        variant.depth,
        variant.heads,
        grid,
        class_tokens=variant.class_tokens,
        mlp_ratio=variant.mlp_ratio,
        pos_embed=pos_embed,
        layer_norm_eps=layer_norm_eps,
        final_norm=final_norm,
        drop_path=drop_path,
        execution=execution,
    )


def check_width(key: str, width: int, num_heads: int) -> None:
    """Raise UserError unless a width is divisible by the number of heads, and by 4 (sincos)."""
    if num_heads < 1 or width % num_heads:
        heads_key = key.replace("width", "heads")
        raise UserError(f"is not divisible by {heads_key}={num_heads}", key=key, value=width)
    if width % 4:
        raise UserError("is not divisible by 4", key=key, value=width)
