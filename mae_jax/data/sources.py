"""Random access to images by record index, and the sources of folders and files."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import numpy as np

from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import local_path
from mae_jax.utils.remote import AnyPath

log = logging.getLogger("mae_jax")

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".dcm"}
SUFFIXES |= {".npy", ".npz"}
MAX_CLASSES = 10**6  # larger numbers are no labels
MAX_LISTED = 5  # broken symlinks that are logged by name

DERIVED_PREFIX = "CHANGED DATA: "  # begins the TFDS description of a downscaled copy


class DataError(UserError):
    """Bad or missing data; the message names the file or record."""


class Record(TypedDict):
    """image: encoded file, or pixels [height, width, channels]; label: class index or -1.

    mask: encoded file, or class numbers [height, width]; only of segmentation.
    """

    image: bytes | np.ndarray
    label: int
    mask: NotRequired[bytes | np.ndarray]


class Source(Protocol):
    """An indexable dataset split."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes; empty without labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def label(self, index: int) -> int:
        """Return the class index of a record, -1 without labels."""
        ...

    def describe(self, index: int) -> str:
        """Return the path or name of a record, for messages."""
        ...

    def fingerprint(self) -> str:
        """Return a hash that changes when records are added, removed or resized."""
        ...


def hash_lines(lines: list[str]) -> str:
    """Return 16 hex digits of the SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class FolderSource:
    """The images of a folder, sorted by the bytes of their names.

    Each subfolder is a class; a folder without subfolders has no labels. Names that begin with a
    dot are ignored, and symlinks are followed.

    Args:
      path: the folder; if it has a subfolder called `split`, that subfolder is read.
      classes: of the training split, whose class indices are used.

    Raises:
      DataError: the folder does not exist, has no images, or has a class not in `classes`.
    """

    def __init__(self, path: str, split: str, classes: tuple[str, ...] = ()):
        root = Path(path)
        if (root / split).is_dir():
            root = root / split
        if not root.is_dir():
            problem = "is not a directory" if root.exists() else "does not exist"
            raise DataError(f"{problem}: {root.absolute()}", key="data.path", value=path)
        self.root = root
        self.scan = _scan(root)
        self.files = self.scan.files
        if not self.files:
            raise DataError(
                f"no images in {root.absolute()} (supported: {', '.join(sorted(SUFFIXES))})"
            )
        self.scan.log_broken_links(root)
        class_of_file = [name.split(os.sep)[0] if os.sep in name else "" for name in self.files]
        names = self._class_names(class_of_file)
        if classes and (unknown := set(names) - set(classes)):
            raise DataError(
                f"{root} has class folders that are not in the training split: "
                f"{', '.join(sorted(unknown))}; training has {', '.join(classes)}"
            )
        self.classes = classes if names and classes else names
        index = {name: i for i, name in enumerate(self.classes)}
        self.labels = [index.get(name, -1) for name in class_of_file]

    def _class_names(self, class_of_file: list[str]) -> tuple[str, ...]:
        folders = self.scan.folders
        if "" in class_of_file:
            if folders:
                file = self.files[class_of_file.index("")]
                log.warning("no class labels: %s is next to the class folders, not in one", file)
            return ()
        names = set(class_of_file)
        if empty := folders - names:
            log.warning("no images in the folders of: %s", ", ".join(sorted(empty)))
        return tuple(sorted(names, key=os.fsencode))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {"image": _read(self.root / self.files[index]), "label": self.labels[index]}

    def label(self, index: int) -> int:
        return self.labels[index]

    def describe(self, index: int) -> str:
        return printable_path(self.root / self.files[index])

    def fingerprint(self) -> str:
        return hash_lines([f"{name} {(self.root / name).stat().st_size}" for name in self.files])


def printable_path(path: AnyPath) -> str:
    """Return a path as one line of text, with unprintable characters escaped."""
    text = os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bad_image_error(source: Source, index: int, error: DataError, hint: str) -> DataError:
    """Return the error for a bad record: its name, the reason and what to do."""
    return DataError(f"{source.describe(index)} is bad: {error}. {hint}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error


@dataclass
class Scan:
    """The contents of a folder: names relative to it, sorted by their bytes.

    files: images at any depth; folders: first-level subfolders; broken_links: symlinks without a
    target; other_suffixes: number of other files by suffix.
    """

    files: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    broken_links: list[str] = field(default_factory=list)
    other_suffixes: Counter[str] = field(default_factory=Counter)

    def log_broken_links(self, root: Path) -> None:
        """Log the images that are broken symlinks."""
        for name in self.broken_links[:MAX_LISTED]:
            log.warning("ignored: %s is a broken symlink", root / name)
        if len(self.broken_links) > MAX_LISTED:
            log.warning("ignored: %d more broken symlinks", len(self.broken_links) - MAX_LISTED)


def _scan(root: Path) -> Scan:
    scan, visited = Scan(), set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a symlink to a parent would loop forever
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
                scan.other_suffixes[suffix] += 1
            elif os.path.isfile(path):
                scan.files.append(os.path.relpath(path, root))
            elif os.path.islink(path) and not os.path.exists(path):
                scan.broken_links.append(os.path.relpath(path, root))
    scan.files.sort(key=os.fsencode)
    return scan


class FileSource:
    """Unlabeled images given one by one; a folder among them adds all images in it.

    Raises:
      DataError: a path does not exist, or there are no images.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str | Path]):
        self.files: list[Path] = []
        for path in map(local_path, paths):
            if path.is_dir():
                scan = _scan(path)
                scan.log_broken_links(path)
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
        return printable_path(self.files[index])

    def fingerprint(self) -> str:
        return hash_lines([f"{file} {file.stat().st_size}" for file in self.files])
