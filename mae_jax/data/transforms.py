"""Encoded images to arrays of one size, on the host; resizing is Pillow's, to the bit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mae_jax.data.decode import Encoded, Pixels, decode
from mae_jax.data.randaugment import RandAugment

Box = tuple[int, int, int, int]
Example = dict[str, np.ndarray]  # what one image contributes to a batch

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


def single_try_crop_box(
    rng: np.random.Generator, image_size: tuple[int, int], scale: tuple[float, float]
) -> Box:
    """The same for linear probing: one try, its sides cut to the image (BYOL's law).

    As in the reference: it differs from the other law, P(whole height) of a 500x375 image being
    .26 instead of .01.
    """
    sides = _random_sides(rng, image_size, scale)
    h, w = (min(max(side, 1), whole) for side, whole in zip(sides, image_size))
    return _placed(rng, image_size, (h, w))


def resize(image: Pixels, size: tuple[int, int], interpolation: str = "bicubic") -> Pixels:
    """Antialiased resizing to height and width, of channels one by one unless grey or RGB."""
    resampling = Image.Resampling[interpolation.upper()]
    height, width = size

    def resized(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(picture.resize((width, height), resampling))

    if image.dtype == np.uint8 and image.shape[-1] == 3:
        return resized(image)
    kind = np.uint8 if image.dtype == np.uint8 else np.float32  # as Pillow computes them
    planes = [resized(plane.astype(kind)) for plane in np.moveaxis(image, -1, 0)]
    array = np.stack(planes, axis=-1)
    if image.dtype == np.uint16:  # a cubic may overshoot
        array = array.round().clip(0, np.iinfo(np.uint16).max)
    return array.astype(image.dtype)


AUGMENTS = ("none", "crop", "weak_crop", "randaugment")


@dataclass(frozen=True)
class TrainTransform:
    """A random resized crop (bicubic, antialiased), a flip, and RandAugment where given.

    image_size: height and width in pixels; scale: range of the crop's share of the area; weak: the
    crop's law is linear probing's; exif: turn images as their EXIF tells.
    """

    image_size: tuple[int, int]
    channels: int
    scale: tuple[float, float]
    flip: bool = True
    weak: bool = False
    augment: RandAugment | None = None
    exif: bool = False

    def __call__(self, encoded: Encoded, rng: np.random.Generator) -> Example:
        """{"image": [h, w, c]}."""
        crop, flip = self.sample_crop(encoded, rng)
        image = resize(crop, self.image_size)
        image = image[:, ::-1] if flip else image
        return {"image": image if self.augment is None else self._augmented(image, rng)}

    def sample_crop(self, encoded: Encoded, rng: np.random.Generator) -> tuple[Pixels, bool]:
        """The crop, not yet resized, and whether it is to be mirrored."""
        image = decode(encoded, self.channels, self.exif)
        crop_box = single_try_crop_box if self.weak else random_crop_box
        left, top, right, lower = crop_box(rng, (image.shape[0], image.shape[1]), self.scale)
        return image[top:lower, left:right], self.flip and rng.random() < 0.5

    def _augmented(self, image: Pixels, rng: np.random.Generator) -> Pixels:
        assert self.augment is not None
        picture = Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if self.grey else image))
        return np.asarray(self.augment(picture, rng)).reshape(image.shape)

    @property
    def grey(self) -> bool:
        return self.channels == 1


@dataclass(frozen=True)
class DeviceResizeTransform:
    """The crops and flips of a TrainTransform, to be resized by `mae_jax.models.image_ops.crop_resize`.

    A crop with a side longer than `side` is resized here instead: resizing an image to the size
    that it has changes nothing.
    """

    train: TrainTransform
    side: int

    def __call__(self, encoded: Encoded, rng: np.random.Generator) -> Example:
        """{"crop": [h, w, c], "crop_size": [2], "flip": []}; in a batch crops lie on a canvas."""
        crop, flip = self.train.sample_crop(encoded, rng)
        if max(crop.shape[:2]) > self.side:
            crop = resize(crop, self.train.image_size)
        size = np.array(crop.shape[:2], np.int32)
        # A copy, for what is waiting not to hold whole images.
        return {"crop": crop.copy(), "crop_size": size, "flip": np.array(flip)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes in a batch of what has another one by itself."""
        return {"crop": (self.side, self.side, self.train.channels)}


MAX_ASPECT = 16.0  # of the part of an image that is looked at, if the model's is not larger


def default_crop_ratio(image_size: Sequence[int]) -> float:
    """The reference's `crop` of an EvalTransform, by the model's image size."""
    return 224 / 256 if max(image_size) <= 224 else 1.0


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
    exif: bool = False

    def __call__(self, encoded: Encoded, rng: object = None) -> Example:
        """{"image": [h, w, c]}."""
        image = decode(encoded, self.channels, self.exif)
        height, width = self.image_size
        if self.squash:
            return {"image": resize(image, self.image_size, self.interpolation)}
        image = _limit_aspect_ratio(image, max(MAX_ASPECT, height / width, width / height))
        # Rounded as torchvision's Resize and CenterCrop do it.
        rows, columns = image.shape[:2]
        if height * columns >= width * rows:  # else the height is what the image has more of
            shape = int(height / self.crop), int(int(height / self.crop) * columns / rows)
        else:
            shape = int(int(width / self.crop) * rows / columns), int(width / self.crop)
        array = resize(image, shape, self.interpolation)
        top, left = round((shape[0] - height) / 2), round((shape[1] - width) / 2)
        return {"image": array[top : top + height, left : left + width]}


def _limit_aspect_ratio(image: Pixels, aspect: float) -> Pixels:
    """A strip without the ends that no crop reaches, which enlarged would fill the memory."""
    height, width = image.shape[:2]
    rows, columns = min(height, math.ceil(aspect * width)), min(width, math.ceil(aspect * height))
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[top : top + rows, left : left + columns]
