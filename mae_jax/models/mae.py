"""The masked autoencoder: an asymmetric pair of encoder and decoder (paper section 3)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mae_jax.models.layers import Dense, ExecutionConfig, layer_norm, make_blocks
from mae_jax.models.patches import gather_patches
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import POS_EMBEDS, Encoder, PosEmbed, check_width


class Decoder(nn.Module):
    """Predicts pixels from the encoded kept patches and one mask token per patch to predict.

    Those are all the masked patches, as in the paper, or some of them: the rest has no token.

    Attention does not care about the order of its tokens, so they are never put back in image
    order: kept ones come first, masked ones after, each with the position embedding of its place.
    """

    patch_values: int
    width: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    pos_embed: str = "sincos"
    layer_norm_eps: float = 1e-6
    execution: ExecutionConfig = ExecutionConfig()

    @nn.compact
    def __call__(
        self,
        latent: Float[Array, "b k1 d"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
        first: int,
    ) -> Float[Array, "b i p"]:
        """Pixels of the patches `[*ids_keep, *ids_masked]` from number `first` on, float32."""
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        x = shard(Dense(self.width, dtype, name="embed")(latent))
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        mask_tokens = jnp.broadcast_to(mask_token.astype(dtype), (*ids_masked.shape, self.width))
        x = jnp.concatenate([x, mask_tokens], axis=1)

        positions = PosEmbed(self.pos_embed, self.grid, self.width, name="pos_embed")()
        places = jnp.concatenate([ids_keep, ids_masked], axis=1) + 1
        places = jnp.pad(places, ((0, 0), (1, 0)))  # row 0 of the table is the cls token's
        x = shard(x + jnp.take(positions[0], places, axis=0).astype(dtype))

        blocks = make_blocks(
            self.depth, self.num_heads, self.mlp_ratio, self.layer_norm_eps, self.execution
        )
        x, _ = blocks(x)
        x = shard(x[:, 1 + first :])
        x = layer_norm("norm", self.layer_norm_eps, dtype)(x)
        return shard(Dense(self.patch_values, dtype, name="head")(x)).astype(jnp.float32)


class MAE(nn.Module):
    """Encoder and decoder; masks come in as indices, so the model itself draws nothing."""

    encoder: Encoder
    decoder: Decoder

    def __call__(
        self,
        patches: Float[Array, "b n p"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
    ) -> Float[Array, "b m p"]:
        """Predicted pixels of `ids_masked`, all masked patches or some, in their order."""
        return self.decoder(
            self.encoder(patches, ids_keep), ids_keep, ids_masked, ids_keep.shape[1]
        )

    def predict(
        self,
        patches: Float[Array, "b n p"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
    ) -> Float[Array, "b n p"]:
        """Predicted pixels of every patch, kept ones included, in image order.

        `ids_keep` and `ids_masked` have to be all patches together.
        """
        pred = self.decoder(self.encoder(patches, ids_keep), ids_keep, ids_masked, 0)
        return gather_patches(
            pred, jnp.argsort(jnp.concatenate([ids_keep, ids_masked], axis=1), axis=1)
        )

    def encode(
        self, patches: Float[Array, "b n p"], ids_keep: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b t d"]:
        """The encoder's tokens, cls first; all patches unless `ids_keep` is given."""
        return self.encoder(patches, ids_keep)


def make_mae(
    size: VitVariant,
    *,
    grid: tuple[int, int],
    channels: int = 3,
    mlp_ratio: float = 4.0,
    decoder_mlp_ratio: float | None = None,
    pos_embed: str = "sincos",
    layer_norm_eps: float = 1e-6,
    execution: ExecutionConfig = ExecutionConfig(),
) -> MAE:
    """An MAE of a size, for images of `grid` rows and columns of patches.

    The decoder has the encoder's mlp_ratio unless it is given its own.
    """
    check_width("model.width", size.width, size.heads)
    check_width("model.decoder_width", size.decoder_width, size.decoder_heads)
    if pos_embed not in POS_EMBEDS:
        raise ValueError(f"model.position={pos_embed!r}; use one of {', '.join(POS_EMBEDS)}")
    shared: dict[str, Any] = dict(
        grid=grid, pos_embed=pos_embed, layer_norm_eps=layer_norm_eps, execution=execution
    )
    encoder = Encoder(size.width, size.depth, size.heads, mlp_ratio=mlp_ratio, **shared)
    decoder = Decoder(
        size.patch**2 * channels,
        size.decoder_width,
        size.decoder_depth,
        size.decoder_heads,
        mlp_ratio=mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio,
        **shared,
    )
    return MAE(encoder=encoder, decoder=decoder)
