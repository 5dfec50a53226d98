"""A source by its kind, or by what lies there."""

from pathlib import Path

from mae_jax.data.in_memory import ARRAYS, read_arrays
from mae_jax.data.sources import DataError, FolderSource, Source

SOURCE_TYPES = ("tfds", "folder", "arrays")
SPLITS = ("train", "validation", "val", "test")  # what folders of images are usually called


def open_source(
    kind: str,
    name: str | None,
    path: str | None,
    split: str,
    classes: tuple[str, ...] = (),
    *,
    image: str = "image",
    index_dir: Path | None = None,
) -> Source:
    """A split of a data set.

    Args:
      kind: "tfds", "folder" or "arrays".
      name, image, index_dir: of a TFDS data set, see TfdsSource.
      path: the folder, or where TFDS data sets are.
      classes: of the training data, whose numbers count.
    """
    if kind == "tfds":
        if not name:
            raise DataError("data.source='tfds' needs data.name, the name of a TFDS data set")
        from mae_jax.data.tfds import TfdsSource  # heavy, and not always needed

        return TfdsSource(name, split, path, image, index_dir)
    if kind not in SOURCE_TYPES:
        raise DataError(f"data.source={kind!r}; use one of {', '.join(SOURCE_TYPES)}")
    if not path:
        raise DataError(f"data.source={kind!r} needs data.path, the folder that it is in")
    if kind == "arrays":
        return read_arrays(path, split, classes)
    return FolderSource(path, split, classes)


def list_splits(data: str, data_dir: str | None) -> list[str]:
    """The splits of a folder or TFDS data set; [""] for a folder that is one itself.

    A folder with one called as splits are has nothing but splits in it.
    """
    folder = Path(data)
    if folder.is_dir():
        found = [split for split in SPLITS if has_split(folder, split)]
        others = sorted(path.name for path in folder.iterdir() if path.is_dir()) if found else []
        return found + [x for x in others if x not in found and x[0] != "."] or [""]
    _check_name(data)
    from mae_jax.data.tfds import open_builder

    return list(open_builder(data, data_dir).info.splits)


def has_split(folder: Path, split: str, kinds: tuple[str, ...] = ("folder", "arrays")) -> bool:
    """Whether a folder has a folder, or a file of arrays, of that name."""
    return ("folder" in kinds and (folder / split).is_dir()) or (
        "arrays" in kinds and any((folder / f"{split}{suffix}").exists() for suffix in ARRAYS)
    )


def open_any(
    data: str,
    data_dir: str | None,
    split: str,
    classes: tuple[str, ...] = (),
    *,
    image: str = "image",
) -> Source:
    """A split of a folder, of files of arrays, or of a TFDS data set, whichever `data` is."""
    if not Path(data).is_dir():
        _check_name(data)
        return open_source("tfds", data, data_dir, split, classes, image=image)
    if split and not has_split(Path(data), split):
        raise DataError(f"{Path(data) / split} does not exist")
    if any(any(Path(data).glob("*/" * depth + "dataset_info.json")) for depth in range(3)):
        raise DataError(
            f"{data} is of TFDS: name the data set, and --data-dir, the folder it is in"
        )
    arrays = split and has_split(Path(data), split, ("arrays",))
    return open_source("arrays" if arrays else "folder", None, data, split, classes)


def _check_name(data: str) -> None:
    """DataError for what can only have been meant as a folder."""
    path = Path(data)
    if path.exists() or path.is_absolute() or data.startswith("."):
        raise DataError(f"{data} {'is not a directory' if path.exists() else 'does not exist'}")
