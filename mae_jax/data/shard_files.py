"""The files of a dataset that is split over many, from a pattern of their names or a folder."""

import itertools
import re
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from mae_jax.data.sources import SUFFIXES, DataError
from mae_jax.utils.remote import AnyPath, RemotePath, any_path

SPLIT = "{split}"  # in a pattern, replaced by the name of a split
SPLIT_NAMES = ("train", "validation", "val", "test")  # the usual ones


@dataclass(frozen=True)
class FileKind:
    """Files of shards: what they are, for messages, and the suffixes of their names."""

    name: str
    suffixes: tuple[str, ...]

    def is_pattern(self, text: str) -> bool:
        """Return whether a text names such files, and not a folder."""
        return text.endswith(self.suffixes)

    def find(self, path: str, split: str) -> list[AnyPath]:
        """Return the files of a split, sorted by name.

        Args:
          path: a pattern as shards/{split}-{0000..1281}.tar, with {a,b} and * too; or a folder, of
            whose files those are taken that have the split in their names, as in-train-0001.tar, or
            those in a subfolder of that name, or all if no name has a split. Files in its subfolder
            "data" belong to it.

        Raises:
          DataError: there are none.
        """
        is_pattern = self.is_pattern(path)
        if is_pattern and SPLIT in path and not split:
            raise DataError(f"there are no {self.name} of any usual split: {path}")
        files = _matching(path, split) if is_pattern else self._in_folder(any_path(path), split)
        if not files:
            raise DataError(f"there are no {self.name} of the split {split!r}: {path}")
        return files

    def has_split(self, path: str, split: str) -> bool:
        """Return whether there are files of this split by name, and not just of any."""
        if self.is_pattern(path):
            return SPLIT in path and any(file.exists() for file in _matching(path, split))
        folder = any_path(path)
        if _list(folder / split, self.suffixes):
            return True
        return any(_names_split(file, split) for file in self._in_data(folder))

    def has_only(self, folder: AnyPath) -> bool:
        """Return whether a folder has such files, and neither folders nor images beside them."""
        others = (x for x in folder.iterdir() if x.is_dir() or x.suffix.lower() in SUFFIXES)
        files = self._in_data(folder)
        return bool(files) and not any(x.name[0] != "." and x.name != "data" for x in others)

    def is_in(self, folder: AnyPath) -> bool:
        """Return whether a folder, its subfolder data or one of a split has such files."""
        folders = [folder / name for name in SPLIT_NAMES]
        return bool(self._in_data(folder)) or any(_list(x, self.suffixes) for x in folders)

    def _in_folder(self, folder: AnyPath, split: str) -> list[AnyPath]:
        if not folder.is_dir():
            problem = "is not a directory" if folder.exists() else "does not exist"
            raise DataError(problem, key="data.path", value=str(folder))
        if inside := _list(folder / split, self.suffixes):
            return inside
        files = self._in_data(folder)
        named = [file for file in files if _names_split(file, split)]
        is_named = lambda file: any(_names_split(file, name) for name in SPLIT_NAMES)
        return named or [file for file in files if not is_named(file)]

    def _in_data(self, folder: AnyPath) -> list[AnyPath]:
        return _list(folder, self.suffixes) or _list(folder / "data", self.suffixes)


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..012} to numbers of that width, and {a,b} to alternatives, as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        return [pattern]
    first, last, names = match.groups()
    if names is None:
        width = len(first) if first.startswith("0") else 0
        names = ",".join(f"{number:0{width}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    expanded = [expand_braces(f"{before}{name}{after}") for name in names.split(",")]
    return list(itertools.chain.from_iterable(expanded))


def _matching(pattern: str, split: str) -> list[AnyPath]:
    """Return the files that a pattern names; those without * need not exist."""
    texts = expand_braces(pattern.replace(SPLIT, split))
    found = [_glob(text) if re.search(r"[*?]", text) else [any_path(text)] for text in texts]
    return list(itertools.chain.from_iterable(found))


def _glob(text: str) -> list[AnyPath]:
    path = any_path(text)
    if isinstance(path, RemotePath):
        return [*path.glob()]
    # A bracket is a character of the name, as in all paths.
    return [Path(name) for name in sorted(glob(text.replace("[", "[[]")))]


def _list(folder: AnyPath, suffixes: tuple[str, ...]) -> list[AnyPath]:
    if not folder.is_dir():
        return []
    return sorted(x for x in folder.iterdir() if x.name.endswith(suffixes) and x.name[0] != ".")


def _names_split(file: AnyPath, split: str) -> bool:
    return re.search(rf"(^|[-_.]){re.escape(split)}([-_.])", file.name) is not None
