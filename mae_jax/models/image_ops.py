"""Pixels on the device: images to normalised floats and back, and crops to one size.

Images are uint8 of 0..255, whose mean and deviation are those of values 0..1; or, of sensors with
values of another range, uint16 or float32, whose mean and deviation are in the same units.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHUNK = 64  # whose crops are resized together, which bounds the memory that it takes


def stats_match_dtype(dtype: Any, mean: Sequence[float]) -> bool:
    """Whether a mean can be that of values of a type: of uint8 it is a share of 255.

    Of other types any may be, but one: that of photographs, which is what a config begins with.
    """
    if dtype == np.uint8:
        return all(0 <= value <= 1 for value in mean)
    return tuple(mean) != IMAGENET_MEAN


def normalize(
    images: Shaped[Array, "*b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b h w c"]:
    """(value - mean) / std per channel, float32; values of uint8 are divided by 255 before."""
    values = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        values = values / 255
    return (values - jnp.array(mean)) / jnp.array(std)


def denormalize(
    pixels: Float[Array, "*b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: Any = jnp.uint8,
) -> Shaped[Array, "*b h w c"]:
    """The inverse of `normalise` for images of a type; integers are rounded, and clipped to it."""
    values = pixels * jnp.array(std) + jnp.array(mean)
    if not jnp.issubdtype(dtype, jnp.integer):
        return values.astype(dtype)
    if dtype == jnp.uint8:
        values = values * 255
    return jnp.clip(jnp.round(values), 0, jnp.iinfo(dtype).max).astype(dtype)


def crop_resize(
    crops: UInt8[Array, "b s s c"],
    sizes: Int[Array, "b 2"],
    flip: Bool[Array, " b"],
    image_size: tuple[int, int],
) -> UInt8[Array, "b h w c"]:
    """Crops, each in the upper left corner of a canvas, as images of one size, some mirrored.

    The bicubic, antialiased resizing of Pillow: first rows, then columns, rounded to 8 bits after
    each. Pillow from 13 on takes columns first for some tall crops.

    Args:
      sizes: height and width of each crop, in pixels.
      image_size: height and width of the images.
    """
    if crops.dtype != jnp.uint8:
        raise TypeError(f"crops are {crops.dtype}, not uint8")

    def one(crop: Array, size: Array, mirrored: Array) -> Array:
        vertical = resize_weights(image_size[0], size[0], crop.shape[0])
        horizontal = resize_weights(image_size[1], size[1], crop.shape[1])
        horizontal = jnp.where(mirrored, horizontal[::-1], horizontal)
        exactly = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        rows = _to_uint8_range(exactly("hwc,xw->hxc", crop.astype(jnp.float32), horizontal))
        return _to_uint8_range(exactly("hxc,yh->yxc", rows, vertical)).astype(jnp.uint8)

    return jax.lax.map(lambda x: one(*x), (crops, sizes, flip), batch_size=CHUNK)


def resize_weights(new: int, old: Int[Array, ""], room: int) -> Float[Array, "new room"]:
    """Weights of `old` samples, of `room` that there are, in `new` ones: Keys' cubic, a = -0.5.

    The cubic is as wide as a new sample where those are fewer: no aliasing.
    """
    x, y = jnp.arange(room), jnp.arange(new)[:, None]
    # Distance of centres, in integers as long as can be.
    away = jnp.abs((2 * x + 1) * new - (2 * y + 1) * old) / (2 * jnp.maximum(old, new))
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    weights = jnp.where(away < 1, near, jnp.where(away < 2, far, 0))
    weights = jnp.where(x < old, weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _to_uint8_range(values: Array) -> Array:
    """Rounded, halves up, and clipped to 0..255."""
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)
