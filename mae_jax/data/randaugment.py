"""RandAugment (Cubuk et al. 2020) on the host, with Pillow.

As in the official code (timm's rand-m9-mstd0.5-inc1): the strength of every operation increases
with its magnitude of 0 to 10, signs are random, and each layer is skipped with probability 0.5.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.utils.errors import UserError

MAX_MAGNITUDE = 10.0
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class OpParams:
    """Random parameters of an operation.

    level: magnitude, 0 to 1; sign: +1 or -1; fill: value or color of pixels outside the image.
    """

    level: float
    sign: int
    fill: int | tuple[int, ...]


Operation = Callable[[Image.Image, OpParams], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], params: OpParams) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=params.fill
    )


def rotate(image: Image.Image, params: OpParams) -> Image.Image:
    """Rotate by up to 30 degrees, counterclockwise for a positive sign."""
    return image.rotate(params.sign * params.level * 30, resample=BICUBIC, fillcolor=params.fill)


def shear_x(image: Image.Image, params: OpParams) -> Image.Image:
    """Shear along x by up to 0.3."""
    return _affine(image, (1, params.sign * params.level * 0.3, 0, 0, 1, 0), params)


def shear_y(image: Image.Image, params: OpParams) -> Image.Image:
    """Shear along y by up to 0.3."""
    return _affine(image, (1, 0, 0, params.sign * params.level * 0.3, 1, 0), params)


def translate_x(image: Image.Image, params: OpParams) -> Image.Image:
    """Shift by up to 45 % of the width, to the left for a positive sign."""
    return _affine(image, (1, 0, params.sign * params.level * 0.45 * image.width, 0, 1, 0), params)


def translate_y(image: Image.Image, params: OpParams) -> Image.Image:
    """Shift by up to 45 % of the height, upwards for a positive sign."""
    return _affine(image, (1, 0, 0, 0, 1, params.sign * params.level * 0.45 * image.height), params)


def posterize(image: Image.Image, params: OpParams) -> Image.Image:
    """Keep 4 bits of each value at the smallest magnitude, 0 bits at the largest."""
    mask = 256 - 2 ** (4 + int(params.level * 4))  # ImageOps.posterize rejects 0 bits
    return _map_values(image, lambda value: value & mask)


def solarize(image: Image.Image, params: OpParams) -> Image.Image:
    """Invert values from a threshold on, which decreases from 256 to 0."""
    return ImageOps.solarize(image, 256 - int(params.level * 256))


def solarize_add(image: Image.Image, params: OpParams) -> Image.Image:
    """Add up to 110 to values below 128."""
    add = int(params.level * 110)
    return _map_values(image, lambda value: min(255, value + add) if value < 128 else value)


def _map_values(image: Image.Image, function: Callable[[int], int]) -> Image.Image:
    return image.point([function(value) for value in range(256)] * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def enhance(image: Image.Image, params: OpParams) -> Image.Image:
        return kind(image).enhance(1 + params.sign * params.level * 0.9)

    return enhance


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "invert": lambda image, _: ImageOps.invert(image),
    "rotate": rotate,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Applies `layers` random operations, each with probability `prob`.

    Args:
      fill: value per channel of pixels outside the image, 0 to 255: the mean of the dataset.
      magnitude: mean of the magnitude, 0 to 10.
      std: standard deviation of the magnitude.

    Raises:
      UserError: a value is out of range.
    """

    fill: tuple[int, ...]
    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    prob: float = 0.5

    def __post_init__(self):
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            self._raise("magnitude", "must be within 0 to 10")
        for name in ("std", "layers"):
            if getattr(self, name) < 0:
                self._raise(name, "must be >= 0")

    def _raise(self, name: str, problem: str) -> NoReturn:
        raise UserError(problem, key=f"data.randaugment_{name}", value=getattr(self, name))

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Return the augmented image, of the same size and mode."""
        fill = self.fill if image.mode == "RGB" else self.fill[0]
        names = tuple(OPERATIONS)
        for index in rng.integers(len(names), size=self.layers):
            magnitude = float(np.clip(rng.normal(self.magnitude, self.std), 0, MAX_MAGNITUDE))
            sign, apply = int(rng.choice([-1, 1])), rng.random() < self.prob
            if apply:
                params = OpParams(magnitude / MAX_MAGNITUDE, sign, fill)
                image = OPERATIONS[names[index]](image, params)
        return image
