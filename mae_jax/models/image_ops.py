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
Size = Any  # of an axis: an int, an int32 array [], or a symbolic dimension of jax.export
REACH = 8.0  # more than filters reach
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
    images: Shaped[Array, "*b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    nodata: bool = False,
) -> Float[Array, "*b h w c"]:
    """Compute (value - mean) / std per channel, float32; uint8 values are divided by 255 first.

    Args:
      nodata: replace NaN, which has no data, by the mean of its channel, 0 here.
    """
    values = images.astype(jnp.float32)
    if images.dtype == jnp.uint8:
        values = values / 255
    pixels = (values - jnp.array(mean)) / jnp.array(std)
    return jnp.where(jnp.isnan(values), 0, pixels) if nodata else pixels


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
    after each. Pillow 13 and later resizes vertically first where the height shrinks by more than
    twice as many pixels as the width.

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


def resize_center_crop(
    images: UInt8[Array, "b h w c"],
    size: tuple[Size, Size],
    crop: tuple[int, int],
    interpolation: str = "bicubic",
) -> UInt8[Array, "b y x c"]:
    """Resize images of one size, which may be symbolic, and crop their centers.

    As Pillow and torchvision, except that Pillow 13 and later resizes vertically first where the
    height shrinks by more than twice as many pixels as the width.

    Args:
      size: height and width of the resized images, pixels, at least those of `crop`.
      crop: height and width of the result, pixels.
      interpolation: a key of `FILTERS`.
    """
    # As in torchvision: half a pixel is rounded to the even side.
    starts = [jnp.round((full - side) / 2).astype(jnp.int32) for full, side in zip(size, crop)]
    vertical, horizontal = (
        resize_weights(side, old, old, total=full, start=start, interpolation=interpolation)
        for side, old, full, start in zip(crop, images.shape[1:3], size, starts)
    )
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    rows = _to_uint8_range(einsum("bhwc,xw->bhxc", images.astype(jnp.float32), horizontal))
    return _to_uint8_range(einsum("bhxc,yh->byxc", rows, vertical)).astype(jnp.uint8)


def _bicubic(away: Array) -> Array:
    """Return Keys' cubic with a = -0.5."""
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((2.5 - 0.5 * away) * away - 4) * away + 2
    return jnp.where(away < 1, near, jnp.where(away < 2, far, 0))


def _bilinear(away: Array) -> Array:
    return jnp.maximum(1 - away, 0)


FILTERS = {"bicubic": _bicubic, "bilinear": _bilinear}


def resize_weights(
    new: int,
    old: Size,
    capacity: Size,
    *,
    total: Size = None,
    start: Size = 0,
    interpolation: str = "bicubic",
) -> Float[Array, "new capacity"]:
    """Return the matrix that resizes the first `old` of `capacity` samples.

    They become `total` samples (`new` by default), of which it returns `new`, from `start` on. When
    downsampling, the filter, a key of `FILTERS`, is stretched for antialiasing.
    """
    is_of_any_size = total is not None
    total = new if total is None else total
    x, y = jnp.arange(capacity), start + jnp.arange(new)[:, None]
    # Distance of sample centers; integers until the division, to be exact.
    away = jnp.abs((2 * x + 1) * total - (2 * y + 1) * old) / (2 * jnp.maximum(old, total))
    inside = x < old
    if is_of_any_size:
        # The integers overflow in images of extreme shapes, though not where the filter reaches.
        scale = jnp.maximum(old, total).astype(jnp.float32)
        rough = (x + 0.5) * (total / scale) - (y + 0.5) * (old / scale)
        inside &= jnp.abs(rough) < REACH
    weights = jnp.where(inside, FILTERS[interpolation](away), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _to_uint8_range(values: Array) -> Array:
    """Round half up and clip to 0..255."""
    return jnp.clip(jnp.floor(values + 0.5), 0, 255)
