"""Views of images with masks, as inputs of a model: whole images, resized, or windows of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped

from mae_jax.data.decode import decode
from mae_jax.data.mask_checks import class_problem, size_problem
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.segmentation import Mask, SegmentationSource, resize_mask
from mae_jax.data.sources import DataError
from mae_jax.data.transforms import resize


@dataclass(frozen=True)
class Views:
    """How images become inputs of the model.

    Args:
      size: height and width of the model's images.
      stride: of windows, rows and columns; None resizes the whole image instead.
      overhang: the last window sticks out of the image, as in pixio's evaluation; otherwise it
        ends with the image.
      interpolation: filter of Pillow, for images.
      fill: value per channel beyond the image.
      bit_depth, options: as in `decode`.
    """

    size: tuple[int, int]
    channels: int
    fill: tuple[float, ...]
    stride: tuple[int, int] | None = None
    overhang: bool = False
    interpolation: str = "bicubic"
    bit_depth: int | None = None
    options: ReadOptions = ReadOptions()

    def boxes(self, height: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return top, left, height and width of the views of an image, some beyond its border."""
        if self.stride is None:
            return [(0, 0, height, width)]
        starts = [
            window_starts(full, size, stride, self.overhang)
            for full, size, stride in zip((height, width), self.size, self.stride)
        ]
        return [(top, left, *self.size) for top in starts[0] for left in starts[1]]

    def read(self, source: SegmentationSource, index: int, num_classes: int) -> "Example":
        """Read an image, cut into views, and its mask.

        Raises:
          DataError: one of them is bad, or they do not fit; names the image.
        """
        try:
            encoded = source[index]["image"]
            image = decode(encoded, self.channels, bit_depth=self.bit_depth, options=self.options)
        except DataError as error:
            raise DataError(f"{source.describe(index)} is bad: {error}") from error
        mask = source.mask(index)
        problem = class_problem(np.unique(mask), num_classes, source.ignore)
        if mask.shape != image.shape[:2]:
            problem = size_problem((image.shape[0], image.shape[1]), mask)
        if problem:
            raise DataError(f"{source.describe(index)}: {problem}")
        boxes = self.boxes(*mask.shape)
        if self.stride is None:
            views = [resize(image, self.size, self.interpolation)]
            masks = [resize_mask(mask, self.size)]
        else:
            fill = np.array(self.fill, image.dtype)
            views = [_cut(image, box, fill) for box in boxes]
            masks = [_cut(mask, box, np.array(source.ignore, mask.dtype)) for box in boxes]
        return Example(np.stack(views), np.stack(masks), mask, boxes)


@dataclass(frozen=True)
class Example:
    """Views [v, h, w, c] of an image with their masks [v, h, w], the whole mask, and boxes."""

    views: Shaped[np.ndarray, "v h w c"]
    view_masks: Int[np.ndarray, "v h w"]
    mask: Mask
    boxes: Sequence[tuple[int, int, int, int]]


def window_starts(full: int, size: int, stride: int, overhang: bool) -> list[int]:
    """Return where windows of `size` begin that cover `full` pixels."""
    if overhang:
        return list(range(0, full, stride))
    last = max(full - size, 0)
    return [*range(0, last, stride), last]


def _cut(array: np.ndarray, box: tuple[int, int, int, int], fill: np.ndarray) -> np.ndarray:
    top, left, height, width = box
    inside = array[top : top + height, left : left + width]
    if inside.shape[:2] == (height, width):
        return inside
    cut = np.empty((height, width, *array.shape[2:]), array.dtype)
    cut[:] = fill
    cut[: inside.shape[0], : inside.shape[1]] = inside
    return cut
