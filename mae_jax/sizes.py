"""The model sizes, as pure data that configs, the FLOP count and checkpoint conversion share."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Transformer widths (features), depths (blocks) and heads; `patch` is in pixels."""

    width: int
    depth: int
    heads: int
    patch: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16


# B, L and H are the paper's (He et al. 2022, section 4); Ti and S are ours, with a lighter decoder.
SIZES = {
    "vit_ti16": Size(192, 12, 3, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_s16": Size(384, 12, 6, 16, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "vit_b16": Size(768, 12, 12, 16),
    "vit_l16": Size(1024, 24, 16, 16),
    "vit_h14": Size(1280, 32, 16, 14),
}


def get_size(name: str) -> Size:
    """The size called `name`; ValueError lists the known names."""
    if name not in SIZES:
        raise ValueError(f"unknown model size {name!r}; known: {', '.join(SIZES)}")
    return SIZES[name]
