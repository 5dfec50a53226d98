"""The model sizes, as pure data that configs, the FLOP count and checkpoint conversion share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class VitVariant:
    """Transformer widths (features), depths (blocks) and heads; `patch` is in pixels."""

    width: int
    depth: int
    heads: int
    patch: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16


# B, L and H are the paper's (He et al. 2022, section 4); Ti and S are ours, with a lighter decoder.
VARIANTS = {
    "vit_ti16": VitVariant(192, 12, 3, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_s16": VitVariant(384, 12, 6, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_b16": VitVariant(768, 12, 12, 16),
    "vit_l16": VitVariant(1024, 24, 16, 16),
    "vit_h14": VitVariant(1280, 32, 16, 14),
}


def get_variant(name: str) -> VitVariant:
    """The size called `name`; ValueError lists the known names."""
    if name not in VARIANTS:
        raise ValueError(f"unknown model size {name!r}; known: {', '.join(VARIANTS)}")
    return VARIANTS[name]
