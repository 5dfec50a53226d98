"""The encoder: a Vision Transformer that sees only the patches it is given."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mae_jax.models.layers import (
    Dense,
    DropPath,
    ExecutionConfig,
    Intermediates,
    layer_norm,
    make_blocks,
)
from mae_jax.models.patches import gather_patches, sincos_pos_embed_2d

POS_EMBEDS = ("sincos", "learned")


class PosEmbed(nn.Module):
    """Position embedding of the cls token (row 0) and every patch, [1, 1 + n, d].

    "sincos" is computed and has no parameter; "learned" starts from the same table and trains.
    """

    kind: str
    grid: tuple[int, int]
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "1 n1 d"]:
        table = jnp.asarray(sincos_pos_embed_2d(self.width, self.grid)[None])
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
    """ViT over the kept patches (paper section 3, "MAE encoder").

    `grid` is rows and columns of patches; `drop_path` is the rate at which the last block drops
    its branches, which falls linearly to 0 in the first. Parameters: patch_embed, cls_token,
    pos_embed (learned positions only), blocks (stacked over depth), norm (unless `final_norm` is
    False).
    """

    width: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
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
        """Tokens after the final norm, cls first, then the patches at `ids_keep` in its order.

        Without `ids_keep` every patch is encoded, in image order. With `drop_path_noise` in [0, 1) paths are
        dropped by them; their order is the reference's: by block, attention before MLP.
        """
        return self._encode(patches, ids_keep, drop_path_noise, return_intermediates=False)[0]

    def with_intermediates(
        self, patches: Float[Array, "b n p"]
    ) -> tuple[Float[Array, "b t d"], Intermediates]:
        """Tokens of every patch, and what each block does; its tokens too take the final norm."""
        return self._encode(patches, None, None, return_intermediates=True)

    @nn.compact
    def _encode(
        self, patches: Any, ids_keep: Any, drop_path_noise: Any, *, return_intermediates: bool
    ) -> tuple[Any, Any]:
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        positions = PosEmbed(self.pos_embed, self.grid, self.width, name="pos_embed")()
        cls_position, positions = positions[:, :1], positions[:, 1:]
        if ids_keep is not None:
            # Embedding only what is kept gives the same numbers as embedding all and dropping.
            patches = shard(gather_patches(patches, ids_keep))
            positions = jnp.take(positions[0], ids_keep, axis=0)
        embed = Dense(self.width, dtype, _uniform_bias(patches.shape[-1]), name="patch_embed")
        x = shard(embed(patches) + positions.astype(dtype))
        # As in the reference: cls and mask tokens are N(0, .02), not truncated.
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        cls = (cls + cls_position).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), 1, self.width)), x], axis=1)
        blocks = make_blocks(
            self.depth,
            self.num_heads,
            self.mlp_ratio,
            self.layer_norm_eps,
            self.execution,
            return_intermediates,
        )
        drop_path = None
        if drop_path_noise is not None:
            rates = jnp.linspace(0.0, self.drop_path, self.depth)
            drop_path = DropPath(1.0 - rates, drop_path_noise)
        x, intermediates = blocks(x, drop_path)
        if self.final_norm:
            norm = layer_norm("norm", self.layer_norm_eps, dtype)
            x = norm(x)
            if intermediates is not None:
                intermediates = intermediates._replace(tokens=norm(intermediates.tokens))
        return x, intermediates


def check_width(name: str, width: int, heads: int) -> None:
    """ValueError unless a width suits its number of heads and a 2-D sine-cosine table."""
    if heads < 1 or width % heads:
        key = name.replace("width", "heads")
        raise ValueError(f"{name}={width} does not divide by {key}={heads}")
    if width % 4:
        raise ValueError(f"{name}={width} must be a multiple of 4")
