"""Scale, crop and flip images together with their masks."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from mae_jax.data.decode import Encoded, Pixels, decode
from mae_jax.data.mask_checks import class_problem, size_problem
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.segmentation import Mask, decode_mask, resize_mask
from mae_jax.data.sources import DataError
from mae_jax.data.transforms import Example, resize


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """Decodes an image and its mask.

    Args:
      image_size: height and width of the model's images, pixels.
      num_classes: masks must be below it, if given.
      ignore: class number of pixels without label.
      bit_depth, options: as in `decode`.
    """

    image_size: tuple[int, int]
    channels: int
    num_classes: int | None
    ignore: int
    bit_depth: int | None = None
    options: ReadOptions = ReadOptions()

    def read(self, encoded: Encoded, mask: Encoded) -> tuple[Pixels, Mask]:
        """Return the pixels of an image, and the class of each.

        Raises:
          DataError: one of them is bad, or they do not fit.
        """
        image = decode(encoded, self.channels, bit_depth=self.bit_depth, options=self.options)
        classes = decode_mask(mask)
        if classes.shape != image.shape[:2]:
            raise DataError(size_problem((image.shape[0], image.shape[1]), classes))
        limit = np.inf if self.num_classes is None else self.num_classes
        wrong = (classes != self.ignore) & ((classes < 0) | (classes >= limit))
        if wrong.any():
            problem = class_problem(classes[wrong], self.num_classes or 0, self.ignore)
            raise DataError(str(problem))
        return image, classes

    def example(self, image: Pixels, classes: Mask) -> Example:
        """Return {"image": [h, w, c], "mask": [h, w]}, the mask with one byte if it fits."""
        small = self.num_classes is not None and self.num_classes <= 256 and 0 <= self.ignore < 256
        return {"image": image, "mask": classes.astype(np.uint8 if small else np.int32)}


@dataclass(frozen=True, kw_only=True)
class ScaleCropTransform(MaskReader):
    """Random scale, crop and flip; images by bicubic interpolation, masks by nearest neighbor.

    Args:
      scale: range of the size of the resized image over that which just covers `image_size`.
      fill: values per channel beyond the image, where the mask is ignored.
    """

    scale: tuple[float, float]
    fill: tuple[float, ...]
    flip: bool = True

    def __call__(self, encoded: Encoded, rng: np.random.Generator, mask: Encoded) -> Example:
        """Return {"image": [h, w, c], "mask": [h, w]}."""
        image, classes = self.read(encoded, mask)
        old = (image.shape[0], image.shape[1])
        scale = rng.uniform(*self.scale) * max(n / o for n, o in zip(self.image_size, old))
        size = [max(round(scale * side), 1) for side in old]
        # Where the crop begins in the resized image; before it, if that is the smaller one.
        begin = [
            int(rng.integers(min(full - side, 0), max(full - side, 0) + 1))
            for full, side in zip(size, self.image_size)
        ]
        first = [max(start, 0) for start in begin]
        last = [min(b + side, full) for b, side, full in zip(begin, self.image_size, size)]
        upper, left, lower, right = (
            position * o / full
            for positions in (first, last)
            for position, o, full in zip(positions, old, size)
        )
        box = (left, upper, right, lower)
        inside = (last[0] - first[0], last[1] - first[1])
        offset = (first[0] - begin[0], first[1] - begin[1])
        fill = np.array(self.fill, image.dtype)
        image = self._pad(resize(image, inside, box=box), offset, fill)
        classes = self._pad(
            resize_mask(classes, inside, box), offset, np.array(self.ignore, np.int32)
        )
        if self.flip and rng.random() < 0.5:
            image, classes = image[:, ::-1], classes[:, ::-1]
        return self.example(image, classes)

    def _pad(
        self, array: Shaped[np.ndarray, "y x ..."], offset: tuple[int, int], fill: np.ndarray
    ) -> Shaped[np.ndarray, "h w ..."]:
        if array.shape[:2] == self.image_size:
            return array
        padded = np.empty((*self.image_size, *array.shape[2:]), array.dtype)
        padded[:] = fill
        (top, left), (rows, columns) = offset, array.shape[:2]
        padded[top : top + rows, left : left + columns] = array
        return padded


@dataclass(frozen=True, kw_only=True)
class WholeTransform(MaskReader):
    """The whole image and its mask, resized; the aspect ratio becomes that of `image_size`."""

    def __call__(self, encoded: Encoded, rng: object, mask: Encoded) -> Example:
        """Return {"image": [h, w, c], "mask": [h, w]}."""
        del rng
        image, classes = self.read(encoded, mask)
        return self.example(resize(image, self.image_size), resize_mask(classes, self.image_size))
