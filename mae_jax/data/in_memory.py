"""Images in memory: array files, and decoded images of any source."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.data.decode import decode
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sources import DataError, Record, Source
from mae_jax.utils import console

ARRAY_SUFFIXES = (".npz", ".npy")


class ArraySource:
    """Images [n, height, width, channels] (or a list of images) with optional labels.

    Args:
      name: name of the dataset in error messages.
      labels: class indices [n], -1 for unlabeled; None without labels.
      classes: class names; the default is the indices as strings.

    Raises:
      DataError: there are no images, or the labels do not fit.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray | Sequence[np.ndarray],
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
    ):
        if not len(images):
            raise DataError(f"{name} has no images")
        if labels is not None and np.shape(labels) != (len(images),):
            raise DataError(
                f"{name} has {len(images)} images, but labels of shape {list(np.shape(labels))}"
            )
        self.name, self._images, self._labels = name, images, labels
        if labels is not None and not classes:
            classes = [str(index) for index in range(int(np.max(labels)) + 1)]
        self.classes = tuple(classes) if labels is not None else ()
        if labels is not None and not -1 <= np.min(labels) <= np.max(labels) < len(classes):
            raise DataError(
                f"{name} has labels from {np.min(labels)} to {np.max(labels)} for {len(classes)} "
                f"classes: they must be within 0 to {len(classes) - 1}, or -1 for unlabeled images"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        return {"image": np.asarray(self._images[index]), "label": self.label(index)}

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def fingerprint(self) -> str:
        """Return a hash of all values."""
        digest = hashlib.sha256(str(self.classes).encode())
        for array in [*self._images, *([] if self._labels is None else [self._labels])]:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def read_arrays(path: str, split: str, classes: tuple[str, ...] = ()) -> ArraySource:
    """Read PATH/SPLIT.npz ("image", optional "label" and "classes") or PATH/SPLIT.npy (images).

    Args:
      classes: class names of the training split, which those in the file must equal.

    Raises:
      DataError: the file does not exist, cannot be read, or has invalid arrays.
    """
    candidates = [Path(path) / f"{split}{suffix}" for suffix in ARRAY_SUFFIXES]
    file = next((file for file in candidates if file.exists()), None)
    if file is None:
        raise DataError(f"neither {candidates[0]} nor {candidates[1].name} exists")
    arrays = load_arrays(file, ("image", "label", "classes"))
    images, labels = arrays.get("image"), arrays.get("label")
    if images is None or images.ndim not in (3, 4):
        problem = "is missing" if images is None else f"has shape {list(images.shape)}"
        raise DataError(f"{file}: array 'image' [n, height, width, channels] {problem}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise DataError(f"{file}: array 'label' has dtype {labels.dtype}, not an integer type")
    names = tuple(str(name) for name in arrays.get("classes", classes))
    if classes and names != classes:
        raise DataError(
            f"{file} has the classes {', '.join(names)}, but training has {', '.join(classes)}"
        )
    return ArraySource(str(file), images, labels, names)


def load_arrays(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return those arrays of a .npz that exist, or the array of a .npy as "image".

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            loaded: Any = np.load(opened, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"image": loaded}
            return {name: loaded[name] for name in names if name in loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


class InMemory:
    """A source whose images are decoded once and kept in memory, except for bad images.

    They are read with `ReadOptions.of_decoded`. Its attribute `original` is the other source.
    """

    def __init__(
        self,
        source: Source,
        channels: int,
        *,
        exif: bool = False,
        bit_depth: int | None = None,
        options: ReadOptions = ReadOptions(),
        threads: int = 2,
    ):
        self.original = source
        self.classes = source.classes
        self.class_names = getattr(source, "class_names", ())  # of masks

        def read(index: int) -> Record | None:
            try:
                record = source[index]
                image = decode(record["image"], channels, exif, bit_depth, options)
                return {**record, "image": image}
            except DataError:
                return None  # raised again when the record is read

        records = ordered_parallel_map(read, len(source), threads)
        self._records = list(console.progress(records, len(source)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index] or self.original[index]

    def label(self, index: int) -> int:
        return self.original.label(index)

    def describe(self, index: int) -> str:
        return self.original.describe(index)

    def fingerprint(self) -> str:
        return self.original.fingerprint()
