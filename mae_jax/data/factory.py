"""Open a split of a dataset, given by its type or detected from its path."""

from dataclasses import dataclass
from pathlib import Path

from mae_jax.data.in_memory import ARRAY_SUFFIXES, read_arrays
from mae_jax.data.sources import DataError, FolderSource, Source

SOURCE_TYPES = ("tfds", "folder", "arrays")
SPLITS = ("train", "validation", "val", "test")  # the usual names of split folders


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset on disk.

    Args:
      source_type: "tfds", "folder" or "arrays"; None detects folder or array file per split.
      name: name of a TFDS dataset, as in `TfdsSource`.
      path: folder with the splits; for TFDS its data_dir, or None for the default of TFDS.
      image_feature: name of the image feature of a TFDS dataset.
      index_dir: where indices of TFRecord files are cached; None caches nothing.
    """

    source_type: str | None
    name: str | None = None
    path: str | None = None
    image_feature: str = "image"
    index_dir: Path | None = None

    def open(self, split: str, classes: tuple[str, ...] = ()) -> Source:
        """Open a split.

        Args:
          classes: class names of the training split, which define the class indices.

        Raises:
          DataError: the dataset or the split does not exist, or cannot be read.
        """
        if self.source_type == "tfds":
            return self._open_tfds(split)
        if self.source_type not in (*SOURCE_TYPES, None):
            raise DataError(
                f"must be one of {', '.join(SOURCE_TYPES)}",
                key="data.source",
                value=self.source_type,
            )
        if not self.path:
            raise DataError("needs data.path, a folder", key="data.source", value=self.source_type)
        is_arrays = self.source_type == "arrays"
        if self.source_type is None:
            _check_split(Path(self.path), split)
            is_arrays = bool(split) and has_split(Path(self.path), split, ("arrays",))
        return (read_arrays if is_arrays else FolderSource)(self.path, split, classes)

    def _open_tfds(self, split: str) -> Source:
        if not self.name:
            raise DataError(
                "needs data.name, the name of a TFDS dataset", key="data.source", value="tfds"
            )
        from mae_jax.data.tfds import TfdsSource  # slow to import

        return TfdsSource(self.name, split, self.path, self.image_feature, self.index_dir)

    def splits(self) -> list[str]:
        """Return the names of the splits; [""] for a folder of images without splits.

        If a folder has a subfolder with the usual name of a split, all its subfolders are splits.
        """
        if self.source_type == "tfds":
            from mae_jax.data.tfds import open_builder

            return list(open_builder(str(self.name), self.path).info.splits)
        folder = Path(str(self.path))
        known = [split for split in SPLITS if has_split(folder, split)]
        others = sorted(path.name for path in folder.iterdir() if path.is_dir()) if known else []
        return known + [x for x in others if x not in known and x[0] != "."] or [""]


def detect_dataset(data: str, data_dir: str | None, image_feature: str = "image") -> DatasetSpec:
    """Return the dataset that a command-line argument names: a folder, or else a TFDS dataset.

    Args:
      data: a folder with images, with split folders or with array files; or a TFDS name.
      data_dir: directory of TFDS datasets; None is the default of TFDS.

    Raises:
      DataError: `data` is a path but not a directory.
    """
    path = Path(data)
    if path.is_dir():
        return DatasetSpec(None, path=data)
    if path.exists() or path.is_absolute() or data.startswith("."):
        raise DataError(f"{data} {'is not a directory' if path.exists() else 'does not exist'}")
    return DatasetSpec("tfds", data, data_dir, image_feature)


def has_split(
    folder: Path, split: str, source_types: tuple[str, ...] = ("folder", "arrays")
) -> bool:
    """Return whether a folder has a subfolder, or an array file, named like a split."""
    return ("folder" in source_types and (folder / split).is_dir()) or (
        "arrays" in source_types
        and any((folder / f"{split}{suffix}").exists() for suffix in ARRAY_SUFFIXES)
    )


def _check_split(folder: Path, split: str) -> None:
    """Raise DataError if a folder lacks the split, or is a TFDS data_dir."""
    if split and not has_split(folder, split):
        raise DataError(f"{folder / split} does not exist")
    if any(any(folder.glob("*/" * depth + "dataset_info.json")) for depth in range(3)):
        raise DataError(
            f"{folder} is a TFDS directory: give the name of the dataset, and its folder as "
            "--data-dir"
        )
