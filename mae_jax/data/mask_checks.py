"""Checks of masks: their sizes, and the class numbers in them."""

from dataclasses import dataclass, field

import numpy as np

from mae_jax.data.decode import decode
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.segmentation import CLASS_NAMES, Mask, SegmentationSource
from mae_jax.data.sources import DataError
from mae_jax.utils import console


@dataclass
class MaskReport:
    """Summary of the masks of a source.

    Attributes:
      bad: what is wrong by name of the image: an unreadable mask, another size, a class number
        that does not exist.
      pixels: number of pixels by class number, with those that are ignored.
    """

    bad: dict[str, str] = field(default_factory=dict)
    pixels: dict[int, int] = field(default_factory=dict)

    def num_classes(self, ignore: int) -> int:
        """Return the number of classes, if the largest number is that of a class."""
        return 1 + max((number for number in self.pixels if number != ignore), default=-1)


def check_masks(
    source: SegmentationSource, channels: int | None, threads: int, num_classes: int = 0
) -> MaskReport:
    """Decode every mask, with a progress bar.

    Args:
      channels: of the images, to compare their sizes with those of the masks; None does not.
      num_classes: 0 if unknown.
    """

    def read(index: int) -> tuple[Mask | DataError, tuple[int, ...] | None]:
        try:
            mask = source.mask(index)
        except DataError as error:
            return error, None
        if channels is None:
            return mask, None
        try:
            return mask, decode(source.images[index]["image"], channels).shape
        except DataError:
            return mask, None  # the check of the images names it

    report, num_classes = MaskReport(), num_classes or len(source.class_names)
    results = ordered_parallel_map(read, len(source), threads)
    for index, (mask, shape) in enumerate(console.progress(results, len(source), "masks")):
        name = source.describe(index)
        if isinstance(mask, DataError):
            report.bad[name] = str(mask)
            continue
        numbers, counts = np.unique(mask, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist()):
            report.pixels[number] = report.pixels.get(number, 0) + count
        if problem := class_problem(numbers, num_classes, source.ignore):
            report.bad[name] = problem
        if shape and mask.shape != shape[:2]:
            report.bad[name] = size_problem((shape[0], shape[1]), mask)
    return report


def require_masks(source: SegmentationSource, num_classes: int, threads: int) -> None:
    """Read all masks once.

    Raises:
      DataError: one is bad, or has a class from `num_classes` on; or no pixel has a class.
    """
    masks = check_masks(source, None, threads, num_classes)
    for name, problem in masks.bad.items():
        raise DataError(f"{name}: {problem}")
    if not masks.num_classes(source.ignore):
        raise DataError(f"all pixels of all masks are {source.ignore}, which is ignored")


def count_classes(source: SegmentationSource, threads: int) -> int:
    """Return the largest class number of all masks, plus 1.

    Raises:
      DataError: a mask is bad, or no pixel has a class.
    """
    masks = check_masks(source, None, threads)
    for name, problem in masks.bad.items():
        raise DataError(f"{name}: {problem}")
    if count := masks.num_classes(source.ignore):
        return count
    raise DataError(f"all pixels of all masks are {source.ignore}, which is ignored")


def size_problem(image_size: tuple[int, int], mask: Mask) -> str:
    """Return the message about a mask of another size than its image."""
    rows, columns = mask.shape
    return (
        f"its mask has {rows} x {columns} pixels, the image {image_size[0]} x {image_size[1]} "
        "(without its EXIF orientation)"
    )


def class_problem(numbers: np.ndarray, num_classes: int, ignore: int) -> str | None:
    """Return the message about class numbers that do not exist, if there are any.

    Args:
      num_classes: 0 if unknown.
    """
    counted = numbers[numbers != ignore]
    wrong = counted[(counted < 0) | (counted >= (num_classes or np.inf))]
    if not wrong.size:
        return None
    limit = f"0 to {num_classes - 1}" if num_classes else "0 or larger"
    return (
        f"its mask has the class {wrong[0]}, but classes are {limit}, and {ignore} is ignored: "
        f"correct it, the number of classes ({CLASS_NAMES}, --num-classes, segment.num_classes) or "
        "the ignored number (--ignore, segment.ignore)"
    )
