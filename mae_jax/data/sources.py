"""Random access to encoded images: a TFDS data set, or a folder."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

log = logging.getLogger("mae_jax")

EMBEDDED = ("photo_crops",)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


class DataError(Exception):
    """The data is not as it should be; the message names the file or record."""


class Record(TypedDict):
    """image: encoded bytes; label: class number or -1; key: what to call it in messages."""

    image: bytes
    label: int
    key: str


class Source(Protocol):
    """A data set that can be indexed; `classes` is empty where there are no labels."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def label(self, index: int) -> int:
        """The class number of a record, -1 where there are no labels."""
        ...

    def key(self, index: int) -> str:
        """What to call a record in messages."""
        ...

    def fingerprint(self) -> str:
        """Changes whenever records are added, removed or resized."""
        ...


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class TfdsSource:
    """A split of a TFDS data set prepared as array_record; TensorFlow is not needed.

    Args:
      name: of the data set, as in "imagenet2012" or "cifar10:3.0.2".
      split: as in "train" or "train[:90%]".
      data_dir: where data sets are prepared; None is TFDS's own default.
    """

    def __init__(self, name: str, split: str, data_dir: str | None):
        import tensorflow_datasets as tfds

        builder = _builder(name, data_dir)
        features: Any = builder.info.features
        if "image" not in features:
            raise DataError(f"{name} has no feature called 'image', only {list(features)}")
        known = builder.info.splits
        if split.split("[")[0] not in known:
            raise DataError(f"{name} has no split {split!r}; it has {', '.join(known) or 'none'}")
        self.name, self.split = name, split
        # A label that is a bare number, without a set of classes, counts as none.
        labelled = "label" in features and hasattr(features["label"], "names")
        self.classes = tuple(features["label"].names) if labelled else ()
        decoders: Any = {"image": tfds.decode.SkipDecoding()}
        try:
            count = known[split].num_examples
        except Exception as error:  # TFDS has no common class for what can be wrong with a slice
            raise DataError(f"{split!r} is no split of {name}: {error}") from error
        if not count:
            raise DataError(f"the split {split!r} of {name} is empty")
        self._records = builder.as_data_source(split, decoders=decoders)
        shards = [Path(file) for file in known[split.split("[")[0]].filepaths]
        sizes = [f"{shard.name} {shard.stat().st_size}" for shard in shards]
        self._fingerprint = _digest([name, split, str(len(self)), *sizes])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._records[index]
        label = int(record["label"]) if self.classes else -1
        return {"image": record["image"], "label": label, "key": self.key(index)}

    def label(self, index: int) -> int:
        return self[index]["label"]

    def key(self, index: int) -> str:
        return f"record {index} of {self.name}/{self.split}"

    def fingerprint(self) -> str:
        return self._fingerprint


def _builder(name: str, data_dir: str | None) -> Any:
    """The TFDS builder, prepared; an embedded data set is prepared where that is still to do."""
    import tensorflow_datasets as tfds

    if name in EMBEDDED:
        from mae_jax.data import embedded

        builder = embedded.PhotoCrops(data_dir=data_dir, file_format="array_record")
        if not builder.is_prepared():
            log.info("preparing %s in %s", name, builder.data_dir)
        builder.download_and_prepare(file_format="array_record")
        return builder
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        raise DataError(f"TFDS knows no data set called {name!r}") from None
    if not builder.is_prepared():
        raise DataError(
            f"{name} is not prepared in {builder.data_dir}. Set data.path to where it is, or "
            f'prepare it once, with TensorFlow installed: python -c "import tensorflow_datasets '
            f"as tfds; tfds.builder('{name}', data_dir=DIR)"
            f".download_and_prepare(file_format='array_record')\""
        )
    return builder


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
            raise DataError(f"data.path={path!r} is not a directory: {root.absolute()}")
        self.root = root
        self.files = sorted(_walk(root), key=os.fsencode)
        if not self.files:
            raise DataError(
                f"no images in {root.absolute()} ({', '.join(sorted(SUFFIXES))} are read)"
            )
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

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        image = _read(self.root / self.files[index])
        return {"image": image, "label": self.labels[index], "key": self.key(index)}

    def label(self, index: int) -> int:
        return self.labels[index]

    def key(self, index: int) -> str:
        return str(self.root / self.files[index])

    def fingerprint(self) -> str:
        return _digest([f"{name} {(self.root / name).stat().st_size}" for name in self.files])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _walk(root: Path) -> list[str]:
    """Paths of the images below `root`, relative to it."""
    found, visited = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link back up would loop forever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.join(folder, name)
            if name.startswith(".") or Path(name).suffix.lower() not in SUFFIXES:
                continue
            if os.path.isfile(path):  # not a dangling link
                found.append(os.path.relpath(path, root))
    return found


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
                self.files += [path / name for name in sorted(_walk(path), key=os.fsencode)]
            elif path.is_file():
                self.files.append(path)
            else:
                raise DataError(f"{path} does not exist")
        if not self.files:
            raise DataError(f"no images in {', '.join(map(str, paths))}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        return {"image": _read(self.files[index]), "label": -1, "key": self.key(index)}

    def label(self, index: int) -> int:
        return -1

    def key(self, index: int) -> str:
        return str(self.files[index])

    def fingerprint(self) -> str:
        return _digest([f"{file} {file.stat().st_size}" for file in self.files])


def make_source(
    kind: str, name: str | None, path: str | None, split: str, classes: tuple[str, ...] = ()
) -> Source:
    """A source by its kind, "tfds" or "folder"; `classes` as in FolderSource."""
    if kind == "tfds":
        if not name:
            raise DataError("data.source='tfds' needs data.name, the name of a TFDS data set")
        return TfdsSource(name, split, path)
    if kind == "folder":
        if not path:
            raise DataError("data.source='folder' needs data.path, a folder of images")
        return FolderSource(path, split, classes)
    raise DataError(f"data.source={kind!r}; use 'tfds' or 'folder'")
