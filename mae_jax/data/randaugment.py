"""RandAugment (Cubuk et al. 2020) on the host, with Pillow.

As in the reference, whose name for it is rand-m9-mstd0.5-inc1: every operation grows with its
magnitude of 0 to 10, signs are drawn, each layer is skipped half of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class OpParams:
    """What an operation may use: level, its magnitude of 0 to 1; sign, +1 or -1; fill, a colour.

    Fill is what comes in from outside the image.
    """

    level: float
    sign: int
    fill: int | tuple[int, ...]


Operation = Callable[[Image.Image, OpParams], Image.Image]


def _affine(image: Image.Image, matrix: tuple[float, ...], draw: OpParams) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=draw.fill
    )


def rotate(image: Image.Image, draw: OpParams) -> Image.Image:
    """By up to 30 degrees."""
    return image.rotate(draw.sign * draw.level * 30, resample=BICUBIC, fillcolor=draw.fill)


def shear_x(image: Image.Image, draw: OpParams) -> Image.Image:
    """By up to 0.3."""
    return _affine(image, (1, draw.sign * draw.level * 0.3, 0, 0, 1, 0), draw)


def shear_y(image: Image.Image, draw: OpParams) -> Image.Image:
    """By up to 0.3."""
    return _affine(image, (1, 0, 0, draw.sign * draw.level * 0.3, 1, 0), draw)


def translate_x(image: Image.Image, draw: OpParams) -> Image.Image:
    """By up to 45 % of the width."""
    return _affine(image, (1, 0, draw.sign * draw.level * 0.45 * image.width, 0, 1, 0), draw)


def translate_y(image: Image.Image, draw: OpParams) -> Image.Image:
    """By up to 45 % of the height."""
    return _affine(image, (1, 0, 0, 0, 1, draw.sign * draw.level * 0.45 * image.height), draw)


def posterize(image: Image.Image, draw: OpParams) -> Image.Image:
    """Down to no bit of each value at the largest magnitude, 4 bits at the smallest."""
    mask = 256 - 2 ** (4 + int(draw.level * 4))  # ImageOps.posterize refuses 0 bits
    return _each_value(image, lambda value: value & mask)


def solarize(image: Image.Image, draw: OpParams) -> Image.Image:
    """Inverts values from a threshold on, which falls from 256 to 0."""
    return ImageOps.solarize(image, 256 - int(draw.level * 256))


def solarize_add(image: Image.Image, draw: OpParams) -> Image.Image:
    """Adds up to 110 to values below 128."""
    add = int(draw.level * 110)
    return _each_value(image, lambda value: min(255, value + add) if value < 128 else value)


def _each_value(image: Image.Image, function: Callable[[int], int]) -> Image.Image:
    return image.point([function(value) for value in range(256)] * len(image.getbands()))


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def enhance(image: Image.Image, draw: OpParams) -> Image.Image:
        return kind(image).enhance(1 + draw.sign * draw.level * 0.9)

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
    """`layers` random operations, each with probability `prob`.

    magnitude: its mean, 0 to 10; std: its standard deviation; fill: the colour of outside pixels
    per channel, 0 to 255, which is the mean of the data.
    """

    fill: tuple[int, ...]
    magnitude: float = 9.0
    std: float = 0.5
    layers: int = 2
    prob: float = 0.5

    def __post_init__(self):
        if not 0 <= self.magnitude <= MAX_MAGNITUDE or self.std < 0 or self.layers < 0:
            raise ValueError(
                f"data.randaugment_magnitude={self.magnitude} must be 0 to 10, and "
                f"randaugment_std={self.std} and randaugment_layers={self.layers} at least 0"
            )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image after this draw's operations, of the same size and mode."""
        fill = self.fill if image.mode == "RGB" else self.fill[0]
        names = tuple(OPERATIONS)
        for number in rng.integers(len(names), size=self.layers):
            magnitude = float(np.clip(rng.normal(self.magnitude, self.std), 0, MAX_MAGNITUDE))
            sign, applied = int(rng.choice([-1, 1])), rng.random() < self.prob
            if applied:
                draw = OpParams(magnitude / MAX_MAGNITUDE, sign, fill)
                image = OPERATIONS[names[number]](image, draw)
        return image
