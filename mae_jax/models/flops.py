"""Floating-point operations of an MAE, counted from its shapes, and what devices can do.

Two per multiply-add of every matrix product, in the paper's form: all patches embedded, the full
decoder and head on all tokens. MFU is always computed with this count, whatever shortcuts the
implementation takes, so that it compares across implementations. Where only some of the masked
patches are predicted (`predicted` of them), the decoder and the head have so many tokens fewer.
What our own form asks for is counted apart, to hold the program to it.
"""

from mae_jax.models.variants import VitVariant


def _blocks(width: int, depth: int, tokens: int, mlp_ratio: float) -> float:
    linears = (4 + 2 * mlp_ratio) * width * width * tokens  # qkv, proj, fc1, fc2
    attention = 2 * tokens * tokens * width  # scores and weighted values
    return 2 * depth * (linears + attention)


def forward_flops(
    size: VitVariant,
    num_patches: int,
    kept: int,
    patch_values: int,
    mlp_ratio: float = 4.0,
    *,
    predicted: int | None = None,
) -> float:
    """FLOPs of the loss of one image; `predicted` is all masked patches unless given."""
    tokens = num_patches + 1 if predicted is None else kept + 1 + predicted
    encoder = encoder_flops(size, num_patches, kept, patch_values, mlp_ratio)
    decoder_embed = 2 * (kept + 1) * size.width * size.decoder_width
    decoder = _blocks(size.decoder_width, size.decoder_depth, tokens, mlp_ratio)
    head = 2 * tokens * size.decoder_width * patch_values
    return encoder + decoder_embed + decoder + head


def encoder_flops(
    size: VitVariant, num_patches: int, kept: int, patch_values: int, mlp_ratio: float = 4.0
) -> float:
    """FLOPs of the encoder's forward pass over one image."""
    embed = _embed(size, num_patches, patch_values)
    return embed + _blocks(size.width, size.depth, kept + 1, mlp_ratio)


def train_flops(
    size: VitVariant,
    num_patches: int,
    kept: int,
    patch_values: int,
    mlp_ratio: float = 4.0,
    *,
    predicted: int | None = None,
) -> float:
    """FLOPs of one image in training: the backward pass costs twice the forward one.

    Except for the patch embedding, which needs no gradient with respect to its input.
    """
    forward = forward_flops(size, num_patches, kept, patch_values, mlp_ratio, predicted=predicted)
    return 3 * forward - _embed(size, num_patches, patch_values)


def executed_forward_flops(
    size: VitVariant, num_patches: int, kept: int, patch_values: int, mlp_ratio: float = 4.0
) -> float:
    """FLOPs of the loss of one image in our form, which gives the same numbers.

    Only kept patches are embedded, and only masked ones are predicted.
    """
    forward = forward_flops(size, num_patches, kept, patch_values, mlp_ratio)
    unembedded = _embed(size, num_patches - kept, patch_values)
    return forward - unembedded - 2 * (kept + 1) * size.decoder_width * patch_values


def executed_train_flops(
    size: VitVariant, num_patches: int, kept: int, patch_values: int, mlp_ratio: float = 4.0
) -> float:
    """FLOPs of one image in training, in our form."""
    forward = executed_forward_flops(size, num_patches, kept, patch_values, mlp_ratio)
    return 3 * forward - _embed(size, kept, patch_values)


def finetune_flops(
    size: VitVariant, num_patches: int, patch_values: int, mlp_ratio: float = 4.0
) -> float:
    """FLOPs of one whole image in training of the encoder alone."""
    forward = encoder_flops(size, num_patches, num_patches, patch_values, mlp_ratio)
    return 3 * forward - _embed(size, num_patches, patch_values)


def _embed(size: VitVariant, num_patches: int, patch_values: int) -> float:
    return 2 * num_patches * patch_values * size.width


# Vendors' dense bf16 peak, FLOP/s, by a part of `jax.Device.device_kind`; the first match counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The peak of a device, or None where it is not known (CPUs, for one)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
