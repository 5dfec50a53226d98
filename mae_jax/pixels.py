"""Pixels on the device: uint8 images to normalised floats and back."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(
    images: UInt8[Array, "*b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b h w c"]:
    """uint8 0..255 to (value / 255 - mean) / std per channel, float32."""
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def unnormalise(
    pixels: Float[Array, "*b h w c"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[Array, "*b h w c"]:
    """The inverse of `normalise`; values outside 0..255 are clipped."""
    images = (pixels * jnp.array(std) + jnp.array(mean)) * 255
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)
