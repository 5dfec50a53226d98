"""Encoded images to uint8 arrays of one size, on the host, with Pillow."""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mae_jax.data.augment import RandAugment
from mae_jax.data.sources import DataError

Box = tuple[int, int, int, int]
MODES = {1: "L", 3: "RGB"}


def decode(encoded: bytes, channels: int) -> Image.Image:
    """A grey or RGB picture; DataError where the bytes are not a whole image.

    As in the reference: no rotation by EXIF, and an alpha channel is dropped.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded)) as image:
                return _eight_bit(image).convert(MODES[channels])
    except UnidentifiedImageError:
        raise DataError("its bytes are not an image") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise DataError(str(error)) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture with 16-bit values scaled down; Pillow's own conversion would clip them at 255.

    Raises:
      DataError: values of 32 bits, of which nobody knows the range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image, np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 bits")
    return image


RATIO = (3 / 4, 4 / 3)  # range of a crop's width over its height


def _random_sides(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of a random area and aspect, which may reach beyond the image."""
    share = rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    return crop_sides(share, aspect, image_size)


def crop_sides(share: float, aspect: float, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a share of an image's area, `aspect` being width over height."""
    area = image_size[0] * image_size[1] * share
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _placed(rng: np.random.Generator, image_size: tuple[int, int], sides: tuple[int, int]) -> Box:
    top, left = (int(rng.integers(0, whole - side + 1)) for whole, side in zip(image_size, sides))
    return left, top, left + sides[1], top + sides[0]


def random_crop_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> Box:
    """Left, upper, right, lower of a crop of random area and aspect, by torchvision's law.

    Ten tries, then the largest central crop of an allowed aspect. `image_size` is height, width.
    """
    height, width = image_size
    for _ in range(10):
        h, w = _random_sides(rng, image_size, scale)
        if 0 < w <= width and 0 < h <= height:
            return _placed(rng, image_size, (h, w))
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def weak_crop_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> Box:
    """The same for linear probing: one try, its sides cut to the image (BYOL's law).

    As in the reference: it differs from the other law, P(whole height) of a 500x375 image being
    .26 instead of .01.
    """
    sides = _random_sides(rng, image_size, scale)
    h, w = (min(max(side, 1), whole) for side, whole in zip(sides, image_size))
    return _placed(rng, image_size, (h, w))


def _resize(
    image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic"
) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])


def _as_array(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


AUGMENTS = ("none", "crop", "weak_crop", "randaugment")


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop (bicubic, antialiased), a flip, and RandAugment where given.

    image_size: height and width in pixels; scale: range of the crop's share of the area; weak: the
    crop's law is linear probing's.
    """

    image_size: tuple[int, int]
    channels: int
    scale: tuple[float, float]
    flip: bool = True
    weak: bool = False
    augment: RandAugment | None = None

    def __call__(self, encoded: bytes, rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
        image = decode(encoded, self.channels)
        crop_box = weak_crop_box if self.weak else random_crop_box
        image = _resize(
            image.crop(crop_box(rng, (image.height, image.width), self.scale)), self.image_size
        )
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _as_array(image if self.augment is None else self.augment(image, rng))


@dataclass(frozen=True)
class EvalTransform:
    """The central part of the image: its largest crop of the wanted aspect, of which `crop` stays.

    224 / 256 = .875 is the usual "resize to 256, crop 224"; 1.0 is the whole crop. With `squash`
    the whole image is resized, whatever its aspect.
    """

    image_size: tuple[int, int]
    channels: int
    crop: float = 0.875
    squash: bool = False
    interpolation: str = "bicubic"

    def __call__(self, encoded: bytes, rng: object = None) -> UInt8[np.ndarray, "h w c"]:
        image = decode(encoded, self.channels)
        height, width = self.image_size
        if self.squash:
            return _as_array(_resize(image, self.image_size, self.interpolation))
        scale = max(height / image.height, width / image.width) / self.crop
        shape = max(height, round(image.height * scale)), max(width, round(image.width * scale))
        array = _as_array(_resize(image, shape, self.interpolation))
        top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
        return array[top : top + height, left : left + width]
