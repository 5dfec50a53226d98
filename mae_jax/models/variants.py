"""ViT variants: the shapes of encoders and decoders, as pure data."""

from dataclasses import dataclass

from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides


@dataclass(frozen=True)
class VitVariant:
    """The shape of a ViT encoder and of the decoder of its MAE.

    width: embedding dimension; depth: number of blocks; heads: attention heads; patch: side of a
    patch, or its height and width, pixels; mlp_ratio: hidden width of an MLP over its width, in
    encoder and decoder; class_tokens: learned tokens before those of the patches.
    """

    width: int
    depth: int
    heads: int
    patch: Sides
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mlp_ratio: float = 4.0
    class_tokens: int = 1


# B, L and H/14 are the paper's (He et al. 2022, section 4); Ti and S are ours, with a lighter
# decoder; H/16, 1B and 5B are Pixio's (Yang et al. 2025), with its decoder.
VARIANTS = {
    "vit_ti16": VitVariant(192, 12, 3, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_s16": VitVariant(384, 12, 6, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_b16": VitVariant(768, 12, 12, 16),
    "vit_l16": VitVariant(1024, 24, 16, 16),
    "vit_h14": VitVariant(1280, 32, 16, 14),
    "vit_h16": VitVariant(1280, 32, 16, 16, decoder_depth=32, class_tokens=8),
    "vit_1b16": VitVariant(1536, 48, 24, 16, decoder_depth=32, class_tokens=8),
    "vit_5b16": VitVariant(3072, 48, 32, 16, decoder_depth=32, class_tokens=8),
}


def get_variant(name: str) -> VitVariant:
    """Return the variant of this name.

    Raises:
      UserError: there is none; lists the known names.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown model size {name!r}; known: {', '.join(VARIANTS)}")
    return VARIANTS[name]
