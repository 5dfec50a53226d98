"""Random access to images by record number, and those of folders and files."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy", ".npz"}
SHOWN = 5  # links to nowhere that are named

DERIVED_PREFIX = "CHANGED DATA: "  # how the description of a copy begins that is not the original


class DataError(UserError):
    """The data is not as it should be; the message names the file or record."""


class Record(TypedDict):
    """One example: `image`, the bytes of a file or pixels [height, width, channels]; `label`, a class
    index, or -1 without a label."""

    image: bytes | np.ndarray
    label: int


class Source(Protocol):
    """A data set that can be indexed; `classes` is empty where there are no labels."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def label(self, index: int) -> int:
        """The class number of a record, -1 where there are no labels."""
        ...

    def describe(self, index: int) -> str:
        """Return the name of a record for messages, such as its path."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever records are added, removed or resized."""
        ...


def fingerprint_of(lines: list[str]) -> str:
    """A fingerprint of lines of text."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class FolderSource:
    """The images of a folder, sorted by name as bytes.

    A folder of folders has one class per folder; a flat one has no labels. Names that begin with
    a dot are ignored and links are followed.

    Args:
      path: the folder; where it has a subfolder called `split`, that one is read.
      classes: of the training data, whose numbers count; no folder may be of another class.
    """

    def __init__(self, path: str, split: str, classes: tuple[str, ...] = ()):
        root = Path(path)
        if (root / split).is_dir():
            root = root / split
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise DataError(f"data.path={path!r} {what}: {root.absolute()}")
        self.root = root
        self.scan = _walk(root)
        self.files = self.scan.files
        if not self.files:
            raise DataError(
                f"no images in {root.absolute()} ({', '.join(sorted(SUFFIXES))} are read)"
            )
        self.scan.warn(root)
        if beside := [name for name in self.files if os.sep not in name and self.scan.folders]:
            log.warning("folders count as no classes, since %s lies beside them", beside[0])
        tops = [name.split(os.sep)[0] if os.sep in name else "" for name in self.files]
        found = () if "" in tops else tuple(sorted(set(tops), key=os.fsencode))
        if unknown := set(found) - set(classes or found):
            raise DataError(
                f"{root} has folders for classes that training has not: "
                f"{', '.join(sorted(unknown))}; its classes are {', '.join(classes)}"
            )
        self.classes = classes if classes and found else found
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number.get(top, -1) for top in tops]
        if found and (empty := self.scan.folders - set(found)):
            log.warning("no images in the folders of: %s", ", ".join(sorted(empty)))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        image = _read(self.root / self.files[index])
        return {"image": image, "label": self.labels[index]}

    def label(self, index: int) -> int:
        return self.labels[index]

    def describe(self, index: int) -> str:
        return printable(self.root / self.files[index])

    def fingerprint(self) -> str:
        return fingerprint_of(
            [f"{name} {(self.root / name).stat().st_size}" for name in self.files]
        )


def printable(path: Path) -> str:
    """A path as text that fits a line, whatever bytes are in its name."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bad_image_error(source: Source, number: int, error: DataError | str, advice: str) -> DataError:
    """What to raise for a record that is bad, and for which reason."""
    return DataError(f"{source.describe(number)} is bad: {error}. {advice}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error


@dataclass
class Scan:
    """What was found below a folder: names relative to it, sorted as bytes.

    files: the images; folders: the first level of folders; dangling: links to nowhere; others:
    how many files have which other suffix.
    """

    files: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    dangling: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def warn(self, root: Path) -> None:
        """Names in the log what may have been meant to be an image."""
        for name in self.dangling[:SHOWN]:
            log.warning("ignored: %s is a link to what does not exist", root / name)
        if len(self.dangling) > SHOWN:
            log.warning("ignored: %d more links to nowhere", len(self.dangling) - SHOWN)


def _walk(root: Path) -> Scan:
    scan, visited = Scan(), set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back up would loop forever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        scan.folders = scan.folders or set(folders)
        for name in files:
            path = os.path.join(folder, name)
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix not in SUFFIXES:
                scan.others[suffix] += 1
            elif os.path.isfile(path):
                scan.files.append(os.path.relpath(path, root))
            elif os.path.islink(path) and not os.path.exists(path):
                scan.dangling.append(os.path.relpath(path, root))
    scan.files.sort(key=os.fsencode)
    return scan


class FileSource:
    """Images named one by one; a folder among them stands for all images in it.

    Raises:
      DataError: a path does not exist, or there is no image at all.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str | Path]):
        self.files: list[Path] = []
        for path in map(Path, paths):
            if path.is_dir():
                scan = _walk(path)
                scan.warn(path)
                self.files += [path / name for name in scan.files]
            elif path.is_file():
                self.files.append(path)
            else:
                raise DataError(f"{path} does not exist")
        if not self.files:
            raise DataError(f"no images in {', '.join(map(str, paths))}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {"image": _read(self.files[index]), "label": -1}

    def label(self, index: int) -> int:
        return -1

    def describe(self, index: int) -> str:
        return printable(self.files[index])

    def fingerprint(self) -> str:
        return fingerprint_of([f"{file} {file.stat().st_size}" for file in self.files])
