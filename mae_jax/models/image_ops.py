"""Image operations on the device: normalization and its inverse, and resizing of crops.

Images are uint8 with mean and standard deviation of values scaled to 0..1; or uint16 or float32,
for sensors of another range, with mean and standard deviation in the units of the pixels.
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
CHUNK = 64  # crops that are resized at a time, to bound memory


def stats_match_dtype(dtype: Any, mean: Sequence[float]) -> bool:
    """Check that a per-channel mean can belong to images of a dtype.

    The mean of uint8 images is scaled to 0..1. For other dtypes every mean is possible, except
    ImageNet's, which is the default of configs.
    """
    if dtype == np.uint8:
        return all(0 <= value <= 1 for value in mean)
    return tuple(mean) != IMAGENET_MEAN


def normalize(
    images: Shaped[Array, "*b h w c"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*b h w c"]:
    """Compute (value - mean) / std per channel, float32; uint8 values are divided by 255 first."""
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
    """Invert `normalize` for images of a dtype; integers are rounded and clipped to its range."""
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
    """Resize crops of different sizes to one size, with optional horizontal flips.

    This is Pillow's bicubic, antialiased resizing: horizontally, then vertically, rounded to 8 bits
    after each. Pillow 13 and later resizes some tall crops vertically first.

    Args:
      crops: canvases with a crop in the upper left corner of each.
      sizes: height and width of each crop, pixels.
      flip: whether to mirror each image.
      image_size: height and width of the result, pixels.

    Raises:
      TypeError: the crops are not uint8.
    """
    if crops.dtype != jnp.uint8:
        raise TypeError(f"crops are {crops.dtype}, not uint8")

    def one(crop: Array, size: Array, mirrored: Array) -> Array:
        vertical = resize_weights(image_size[0], size[0], crop.shape[0])
        horizontal = resize_weights(image_size[1], size[1], crop.shape[1])
        horizontal = jnp.where(mirrored, horizontal[::-1], horizontal)
        einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        rows = _to_uint8_range(einsum("hwc,xw->hxc", crop.astype(jnp.float32), horizontal))
        return _to_uint8_range(einsum("hxc,yh->yxc", rows, vertical)).astype(jnp.uint8)

    return jax.lax.map(lambda x: one(*x), (crops, sizes, flip), batch_size=CHUNK)


def resize_weights(new: int, old: Int[Array, ""], capacity: int) -> Float[Array, "new capacity"]:
    """Return the matrix that resizes the first `old` of `capacity` samples to `new` samples.

    Keys' cubic with a = -0.5; when downsampling it is stretched for antialiasing.
    """
    x, y = jnp.arange(capacity), jnp.arange(new)[:, None]
    # Distance of sample centers; integers until the division, to be exact.
    away = jnp.abs((2 * x + 1) * new - (2 * y + 1) * old) / (2 * jnp.maximum(old, new))
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    weights = jnp.where(away < 1, near, jnp.where(away < 2, far, 0))
    weights = jnp.where(x < old, weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _to_uint8_range(values: Array) -> Array:
    """Round half up and clip to 0..255."""
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)
