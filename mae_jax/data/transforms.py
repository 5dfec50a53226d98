"""Crop, flip and resize images on the host; resizing is bit-identical to Pillow."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mae_jax.data.decode import Encoded, Pixels, decode
from mae_jax.data.randaugment import RandAugment
from mae_jax.data.read_options import ReadOptions

Box = tuple[int, int, int, int]  # left, upper, right, lower
Example = dict[str, np.ndarray]  # the arrays of one image in a batch

ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height of random crops


def _sample_crop_size(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> tuple[int, int]:
    """Return height and width of a random area and aspect ratio; may exceed the image."""
    area_fraction = rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
    return crop_size(area_fraction, aspect, image_size)


def crop_size(area_fraction: float, aspect: float, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a fraction of an image's area; `aspect` is width / height."""
    area = image_size[0] * image_size[1] * area_fraction
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def _sample_position(
    rng: np.random.Generator, image_size: tuple[int, int], size: tuple[int, int]
) -> Box:
    top, left = (int(rng.integers(0, full - side + 1)) for full, side in zip(image_size, size))
    return left, top, left + size[1], top + size[0]


def random_crop_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> Box:
    """Sample a crop of random area and aspect ratio, as torchvision's RandomResizedCrop.

    After ten crops that do not fit, return the largest center crop of an allowed aspect ratio.

    Args:
      image_size: height, width.
      scale: range of the fraction of the area.
    """
    height, width = image_size
    for _ in range(10):
        h, w = _sample_crop_size(rng, image_size, scale)
        if 0 < w <= width and 0 < h <= height:
            return _sample_position(rng, image_size, (h, w))
    w = min(width, round(height * ASPECT_RANGE[1]))
    h = min(height, round(width / ASPECT_RANGE[0]))
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def single_try_crop_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> Box:
    """Sample a crop for linear probing: one try, clipped to the image (as in BYOL).

    As in the official code, its distribution differs from `random_crop_box`: for a 500x375 image
    the crop has the full height with probability 0.26 instead of 0.01.
    """
    sampled = _sample_crop_size(rng, image_size, scale)
    h, w = (min(max(side, 1), full) for side, full in zip(sampled, image_size))
    return _sample_position(rng, image_size, (h, w))


def resize(
    image: Pixels,
    size: tuple[int, int],
    interpolation: str = "bicubic",
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """Resize with antialiasing to height and width; channel by channel unless gray or RGB.

    NaN, which has no data, contributes nothing: a value is the mean of the others, by the filter's
    weights, or NaN if those of the others are less than half of all.

    Args:
      box: left, upper, right and lower border of the part to resize, pixels; None: all.
    """
    resampling = Image.Resampling[interpolation.upper()]
    height, width = size

    def resize_plane(plane: np.ndarray) -> np.ndarray:
        pil_image = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(pil_image.resize((width, height), resampling, box))

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return resize_plane(image)
    dtype = np.uint8 if image.dtype == np.uint8 else np.float32  # those that Pillow supports
    planes = [
        _resize_valid(plane.astype(dtype), resize_plane) for plane in np.moveaxis(image, -1, 0)
    ]
    array = np.stack(planes, axis=-1)
    if image.dtype == np.uint16:  # bicubic interpolation may overshoot
        array = array.round().clip(0, np.iinfo(np.uint16).max)
    return array.astype(image.dtype)


def _resize_valid(
    plane: np.ndarray, resize_plane: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Resize a plane by the values that are not NaN."""
    valid = np.isfinite(plane)
    if valid.all():
        return resize_plane(plane)
    weights = resize_plane(valid.astype(np.float32))
    values = resize_plane(np.where(valid, plane, np.float32(0)))
    return np.where(weights >= 0.5, values / np.maximum(weights, 0.5), np.float32(np.nan))


AUGMENTS = ("none", "crop", "weak_crop", "randaugment")


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop (bicubic, antialiased), horizontal flip and optional RandAugment.

    Args:
      image_size: height and width in pixels.
      scale: range of the crop's fraction of the area.
      weak: sample crops with `single_try_crop_box`, for linear probing.
      exif: apply the EXIF orientation.
      bit_depth, options: as in `decode`.
    """

    image_size: tuple[int, int]
    channels: int
    scale: tuple[float, float]
    flip: bool = True
    weak: bool = False
    augment: RandAugment | None = None
    exif: bool = False
    bit_depth: int | None = None
    options: ReadOptions = ReadOptions()

    def __call__(self, encoded: Encoded, rng: np.random.Generator) -> Example:
        """Return {"image": [h, w, c]}."""
        crop, flip = self.sample_crop(encoded, rng)
        image = resize(crop, self.image_size)
        image = image[:, ::-1] if flip else image
        return {"image": image if self.augment is None else self._augment(image, rng)}

    def sample_crop(self, encoded: Encoded, rng: np.random.Generator) -> tuple[Pixels, bool]:
        """Return a crop before resizing, and whether to flip it."""
        image = decode(encoded, self.channels, self.exif, self.bit_depth, self.options)
        sample_box = single_try_crop_box if self.weak else random_crop_box
        left, top, right, lower = sample_box(rng, (image.shape[0], image.shape[1]), self.scale)
        return image[top:lower, left:right], self.flip and rng.random() < 0.5

    def _augment(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        assert self.augment is not None
        plane = image.squeeze(-1) if self.channels == 1 else image
        pil_image = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(self.augment(pil_image, rng)).reshape(image.shape)


@dataclass(frozen=True)
class DeviceResizeTransform:
    """The crops and flips of `train`, to be resized by `mae_jax.models.image_ops.crop_resize`.

    A crop with a side longer than `side` is resized on the host; resizing it again on the device
    changes nothing.
    """

    train: TrainTransform
    side: int

    def __call__(self, encoded: Encoded, rng: np.random.Generator) -> Example:
        """Return {"crop": [h, w, c], "crop_size": [2], "flip": []}."""
        crop, flip = self.train.sample_crop(encoded, rng)
        if max(crop.shape[:2]) > self.side:
            crop = resize(crop, self.train.image_size)
        size = np.array(crop.shape[:2], np.int32)
        # A copy, so that prefetched crops do not keep full images in memory.
        return {"crop": crop.copy(), "crop_size": size, "flip": np.array(flip)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Row shapes in a batch of the arrays that differ in size."""
        return {"crop": (self.side, self.side, self.train.channels)}


MAX_ASPECT = 16.0  # images are trimmed to this aspect ratio, unless the model's is larger


def default_crop_ratio(image_size: Sequence[int]) -> float:
    """Return the official code's `crop` of an EvalTransform for a model's image size."""
    return 224 / 256 if max(image_size) <= 224 else 1.0


@dataclass(frozen=True)
class EvalTransform:
    """Deterministic resize and center crop.

    Args:
      crop: fraction of each side to keep of the largest center crop with the model's aspect ratio:
        0.875 is the usual "resize to 256, crop to 224".
      exif: apply the EXIF orientation.
      bit_depth, options: as in `decode`.
    """

    image_size: tuple[int, int]
    channels: int
    crop: float = 0.875
    interpolation: str = "bicubic"
    exif: bool = False
    bit_depth: int | None = None
    options: ReadOptions = ReadOptions()

    def __call__(self, encoded: Encoded, rng: object = None) -> Example:
        """Return {"image": [h, w, c]}."""
        image = decode(encoded, self.channels, self.exif, self.bit_depth, self.options)
        height, width = self.image_size
        image = _limit_aspect_ratio(image, max(MAX_ASPECT, height / width, width / height))
        # Rounded as in torchvision's Resize and CenterCrop.
        rows, columns = image.shape[:2]
        if height * columns >= width * rows:  # the image is wider than the model's aspect ratio
            size = int(height / self.crop), int(int(height / self.crop) * columns / rows)
        else:
            size = int(int(width / self.crop) * rows / columns), int(width / self.crop)
        array = resize(image, size, self.interpolation)
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        return {"image": array[top : top + height, left : left + width]}


def _limit_aspect_ratio(image: Pixels, limit: float) -> Pixels:
    """Trim the ends of a very long image, so that the resized image fits in memory."""
    height, width = image.shape[:2]
    rows, columns = min(height, math.ceil(limit * width)), min(width, math.ceil(limit * height))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[top : top + rows, left : left + columns]
