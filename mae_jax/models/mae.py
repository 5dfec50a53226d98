"""The masked autoencoder: an asymmetric pair of encoder and decoder (paper section 3)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from mae_jax.models.layers import Dense, ExecutionConfig, apply_blocks, layer_norm
from mae_jax.models.patches import gather_patches, num_patch_values
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import Encoder, PosEmbed, check_width, make_encoder


class Decoder(nn.Module):
    """Predicts pixels from the encoded kept patches and one mask token per patch to predict.

    Attention is permutation-equivariant, so tokens are not restored to image order: kept patches
    come first, then masked ones, each with the position embedding of its place in the image.
    """

    patch_values: int
    width: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    class_tokens: int = 1
    mlp_ratio: float = 4.0
    pos_embed: str = "sincos"
    layer_norm_eps: float = 1e-6
    execution: ExecutionConfig = ExecutionConfig()

    @nn.compact
    def __call__(
        self,
        latent: Float[Array, "b t d"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
        first: int,
    ) -> Float[Array, "b i p"]:
        """Predict the pixels, float32, of `concatenate([ids_keep, ids_masked])[first:]`."""
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        count = self.class_tokens
        x = shard(Dense(self.width, dtype, name="embed")(latent))
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
        # Cast per patch, as the cls token: so its gradient is summed in float32.
        mask_tokens = jnp.broadcast_to(mask_token, (*ids_masked.shape, self.width))
        x = jnp.concatenate([x, mask_tokens.astype(dtype)], axis=1)

        table = PosEmbed(self.pos_embed, self.grid, self.width, count, name="pos_embed")()
        class_rows = jnp.broadcast_to(jnp.arange(count), (x.shape[0], count))
        rows = jnp.concatenate([class_rows, ids_keep + count, ids_masked + count], axis=1)
        x = shard(x + jnp.take(table[0], rows, axis=0).astype(dtype))

        x, _ = apply_blocks(
            x, self.depth, self.num_heads, self.mlp_ratio, self.layer_norm_eps, self.execution
        )
        x = shard(x[:, count + first :])
        x = layer_norm("norm", self.layer_norm_eps, dtype)(x)
        return shard(Dense(self.patch_values, dtype, name="head")(x)).astype(jnp.float32)


class MAE(nn.Module):
    """Encoder and decoder. Masks are inputs, as patch indices; the model has no randomness."""

    encoder: Encoder
    decoder: Decoder

    def __call__(
        self,
        patches: Float[Array, "b n p"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
        drop_path_noise: Float[Array, "depth 2 b"] | None = None,
    ) -> Float[Array, "b m p"]:
        """Predict the pixels of `ids_masked`, all masked patches or some, from the kept ones.

        `drop_path_noise` as in `Encoder`: the decoder has no drop path.
        """
        latent = self.encoder(patches, ids_keep, drop_path_noise)
        return self.decoder(latent, ids_keep, ids_masked, ids_keep.shape[1])

    def predict(
        self,
        patches: Float[Array, "b n p"],
        ids_keep: Int[Array, "b k"],
        ids_masked: Int[Array, "b m"],
    ) -> Float[Array, "b n p"]:
        """Predict the pixels of every patch, kept ones included, in image order.

        `ids_keep` and `ids_masked` must be a partition of all patches.
        """
        pred = self.decoder(self.encoder(patches, ids_keep), ids_keep, ids_masked, 0)
        ids_restore = jnp.argsort(jnp.concatenate([ids_keep, ids_masked], axis=1), axis=1)
        return gather_patches(pred, ids_restore)

    def encode(
        self, patches: Float[Array, "b n p"], ids_keep: Int[Array, "b k"] | None = None
    ) -> Float[Array, "b t d"]:
        """Return the encoder's tokens, class tokens first; of all patches without `ids_keep`."""
        return self.encoder(patches, ids_keep)

    def global_feature(self, patches: Float[Array, "b n p"]) -> Float[Array, "b d"]:
        """Return `Encoder.global_feature`."""
        return self.encoder.global_feature(patches)


def make_mae(
    variant: VitVariant,
    *,
    grid: tuple[int, int],
    channels: int = 3,
    decoder_mlp_ratio: float | None = None,
    pos_embed: str = "sincos",
    layer_norm_eps: float = 1e-6,
    drop_path: float = 0.0,
    execution: ExecutionConfig = ExecutionConfig(),
) -> MAE:
    """Return the MAE of a variant for images of `grid` rows and columns of patches.

    Args:
      decoder_mlp_ratio: of the decoder, if it differs from the variant's.
      drop_path: of the encoder, as in `Encoder`.

    Raises:
      UserError: the variant is not a valid ViT, or `pos_embed` is unknown.
    """
    encoder = make_encoder(
        variant,
        grid,
        pos_embed=pos_embed,
        layer_norm_eps=layer_norm_eps,
        drop_path=drop_path,
        execution=execution,
    )
    check_width("model.decoder_width", variant.decoder_width, variant.decoder_heads)
    decoder = Decoder(
        num_patch_values(variant.patch, channels),
        variant.decoder_width,
        variant.decoder_depth,
        variant.decoder_heads,
        grid,
        class_tokens=variant.class_tokens,
        mlp_ratio=variant.mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio,
        pos_embed=pos_embed,
        layer_norm_eps=layer_norm_eps,
        execution=execution,
    )
    return MAE(encoder=encoder, decoder=decoder)
