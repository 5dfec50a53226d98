"""Images in memory: arrays that are so from the start, and decoded images of any source."""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.data.decode import decode
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sources import DataError, Record, Source
from mae_jax.utils import console

ARRAYS = (".npz", ".npy")  # suffixes of files of arrays


class ArraySource:
    """Images [n, height, width, channels] (or a list of such), and their labels if there are any.

    Args:
      name: what to call it in messages.
      labels: class numbers [n]; None where there are none.
      classes: names of the classes; numbers unless given.

    Raises:
      DataError: there are no images, or not as many labels as images.
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
                f"{name} has {len(images)} images and labels of shape {list(np.shape(labels))}"
            )
        self.name, self._images, self._labels = name, images, labels
        if labels is not None and not classes:
            classes = [str(number) for number in range(int(np.max(labels)) + 1)]
        self.classes = tuple(classes) if labels is not None else ()
        if labels is not None and not -1 <= np.min(labels) <= np.max(labels) < len(classes):
            raise DataError(
                f"{name} has labels from {np.min(labels)} to {np.max(labels)} for {len(classes)} "
                "classes: they are numbers from 0 up, or -1 for none"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        image = np.asarray(self._images[index])
        return {"image": image, "label": self.label(index)}

    def label(self, index: int) -> int:
        return -1 if self._labels is None else int(self._labels[index])

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.classes).encode())
        for array in [*self._images, *([] if self._labels is None else [self._labels])]:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def read_arrays(path: str, split: str, classes: tuple[str, ...] = ()) -> ArraySource:
    """The images of PATH/SPLIT.npz ("image", "label" and "classes") or PATH/SPLIT.npy.

    "label" and "classes" may be missing; `classes` are those of the training data.

    Raises:
      DataError: there is no such file, or not what it should hold.
    """
    found = [Path(path) / f"{split}{suffix}" for suffix in ARRAYS]
    file = next((file for file in found if file.exists()), None)
    if file is None:
        raise DataError(f"neither {found[0]} nor {found[1].name} exists")
    arrays = _arrays_of(file)
    images, labels = arrays.get("image"), arrays.get("label")
    if images is None or images.ndim not in (3, 4):
        shape = "is missing" if images is None else f"has shape {list(images.shape)}"
        raise DataError(f"{file}: its array 'image' [n, height, width, channels] {shape}")
    if labels is not None and labels.dtype.kind not in "iu":
        raise DataError(f"{file}: its array 'label' is of {labels.dtype}, not of class numbers")
    names = tuple(str(name) for name in arrays.get("classes", classes))
    if classes and names != classes:
        raise DataError(
            f"{file}: its classes are {', '.join(names)}, those of training {', '.join(classes)}"
        )
    return ArraySource(str(file), images, labels, names)


def _arrays_of(file: Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as opened:
            loaded: Any = np.load(opened, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"image": loaded}
            names = ("image", "label", "classes")
            return {name: loaded[name] for name in names if name in loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


class InMemory:
    """A source whose images are decoded once, at the start, and kept."""

    def __init__(self, source: Source, channels: int, *, exif: bool = False, threads: int = 2):
        self._source = source
        self.classes = source.classes

        def read(number: int) -> Record | None:
            try:
                record = source[number]
                return {**record, "image": decode(record["image"], channels, exif)}
            except DataError:
                return None  # whoever asks for it is told why

        records = ordered_parallel_map(read, len(source), threads)
        self._records = list(console.progress(records, len(source)))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index] or self._source[index]

    def label(self, index: int) -> int:
        return self._source.label(index)

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()
