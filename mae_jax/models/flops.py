"""Analytic FLOPs of an MAE, for the MFU (model FLOPs utilization), and peak FLOP/s of devices.

Counts two FLOPs per multiply-add of every matrix product, in the paper's form: all patches are
embedded; decoder and head see all tokens. The MFU uses this count whatever shortcuts the
implementation takes, so that it can be compared across implementations.

Arguments: num_patches of an image; kept: those that the encoder sees; patch_values: values of a
patch (height * width * channels); predicted: masked patches that the decoder predicts (None: all).
"""

import re

from mae_jax.models.variants import VitVariant


def forward_flops(
    variant: VitVariant,
    num_patches: int,
    kept: int,
    patch_values: int,
    *,
    predicted: int | None = None,
) -> float:
    """Count the FLOPs of the loss of one image."""
    latent = variant.class_tokens + kept
    tokens = variant.class_tokens + num_patches if predicted is None else latent + predicted
    encoder = encoder_flops(variant, num_patches, kept, patch_values)
    decoder_embed = 2 * latent * variant.width * variant.decoder_width
    decoder = _blocks(variant.decoder_width, variant.decoder_depth, tokens, variant.mlp_ratio)
    head = 2 * tokens * variant.decoder_width * patch_values
    return encoder + decoder_embed + decoder + head


def encoder_flops(variant: VitVariant, num_patches: int, kept: int, patch_values: int) -> float:
    """Count the FLOPs of the encoder's forward pass over one image."""
    embed = patch_embed_flops(variant, num_patches, patch_values)
    tokens = variant.class_tokens + kept
    return embed + _blocks(variant.width, variant.depth, tokens, variant.mlp_ratio)


def train_flops(
    variant: VitVariant,
    num_patches: int,
    kept: int,
    patch_values: int,
    *,
    predicted: int | None = None,
) -> float:
    """Count the FLOPs of one image in pretraining.

    The backward pass costs twice the forward pass, except for the patch embedding, which needs no
    gradient with respect to its input.
    """
    forward = forward_flops(variant, num_patches, kept, patch_values, predicted=predicted)
    return 3 * forward - patch_embed_flops(variant, num_patches, patch_values)


def finetune_flops(variant: VitVariant, num_patches: int, patch_values: int) -> float:
    """Count the FLOPs of one unmasked image in training of the encoder, without its head."""
    forward = encoder_flops(variant, num_patches, num_patches, patch_values)
    return 3 * forward - patch_embed_flops(variant, num_patches, patch_values)


def patch_embed_flops(variant: VitVariant, num_patches: int, patch_values: int) -> float:
    """Count the FLOPs of the forward pass of the patch embedding."""
    return 2 * num_patches * patch_values * variant.width


def _blocks(width: int, depth: int, tokens: int, mlp_ratio: float) -> float:
    linears = (4 + 2 * mlp_ratio) * width * width * tokens  # qkv, proj, fc1, fc2
    attention = 2 * tokens * tokens * width  # scores and weighted values
    return 2 * depth * (linears + attention)


# Dense bf16 peak FLOP/s by the vendor, by words of `jax.Device.device_kind`; the longest match.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2500e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5 lite": 197e12,  # v5e
    "TPU v6 lite": 918e12,  # v6e, Trillium
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of a device, or None if it is unknown, as for CPUs."""
    matches = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_kind)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
