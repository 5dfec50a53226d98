"""Open a split of a dataset, given by its type or detected from its path."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_jax.data.hf_cache import cached_splits, find_cached
from mae_jax.data.in_memory import ARRAY_SUFFIXES, read_arrays
from mae_jax.data.shard_files import SPLIT_NAMES, FileKind
from mae_jax.data.sources import DataError, FolderSource, Source
from mae_jax.data.tar import TARS, TarSource
from mae_jax.utils.paths import is_address
from mae_jax.utils.remote import AnyPath, any_path

SOURCE_TYPES = ("tfds", "folder", "arrays", "tar", "parquet", "hf")
HF_PREFIX = "hf:"  # of names of datasets of "hf" on the command line
PARQUET = FileKind("Parquet files", (".parquet",))
SHARDS = {"tar": TARS, "parquet": PARQUET}


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset on disk, or tar or Parquet files in an object store.

    Args:
      source_type: one of SOURCE_TYPES; None detects a folder of images, an array file, or tar or
        Parquet files, per split.
      name: name of a TFDS dataset, as in `TfdsSource`, or of a dataset of "hf", as in
        `find_cached`.
      path: folder with the splits, or a pattern as in `FileKind.find`; for TFDS its data_dir, for
        "hf" the cache, or None for their defaults.
      image_feature: name of the image feature of a TFDS dataset or column, or suffix as in
        `TarSource`.
      index_dir: where indices of TFRecord and tar files are cached; None caches nothing.
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
        if self.source_type == "hf":
            files = find_cached(str(self.name), split, self.path)
            return self._open_tables(files, classes)
        if not self.path:
            raise DataError("needs data.path, a folder", key="data.source", value=self.source_type)
        source_type = self.source_type or _detect_type(self.path, split)
        if source_type == "tar":
            files = TARS.find(self.path, split)
            return TarSource(files, classes, self.index_dir, self.image_feature)
        if source_type == "parquet":
            return self._open_tables(PARQUET.find(self.path, split), classes)
        return (read_arrays if source_type == "arrays" else FolderSource)(self.path, split, classes)

    def _open_tables(self, files: Sequence[AnyPath], classes: tuple[str, ...]) -> Source:
        try:
            from mae_jax.data.tables import TableSource  # needs pyarrow, an extra
        except ImportError as error:
            raise DataError(
                "Parquet and Arrow files need pyarrow: pip install 'mae_jax[parquet]'"
            ) from error
        return TableSource(files, classes, self.image_feature)

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
        if self.source_type == "hf":
            return cached_splits(str(self.name), self.path)
        path = str(self.path)
        known = [split for split in SPLIT_NAMES if has_split(path, split)]
        if not Path(path).is_dir() or _only_shards(path):
            return known or [""]
        folders = sorted(x.name for x in Path(path).iterdir() if x.is_dir()) if known else []
        return known + [x for x in folders if x not in known and x[0] != "."] or [""]


def detect_dataset(data: str, data_dir: str | None, image_feature: str = "image") -> DatasetSpec:
    """Return the dataset that a command-line argument names: a path, or else a TFDS dataset.

    Args:
      data: a folder with images, with split folders, or with array, tar or Parquet files; a pattern
        of such files; hf:NAME; or a TFDS name.
      data_dir: directory of TFDS datasets, or cache of "hf"; None is the default.

    Raises:
      DataError: `data` is a path but not a directory.
    """
    path = Path(data)
    if is_path(data):
        return DatasetSpec(None, path=data, image_feature=image_feature)
    if data.startswith(HF_PREFIX):
        return DatasetSpec("hf", data.removeprefix(HF_PREFIX), data_dir, image_feature)
    if path.exists() or path.is_absolute() or data.startswith("."):
        raise DataError(f"{data} {'is not a directory' if path.exists() else 'does not exist'}")
    return DatasetSpec("tfds", data, data_dir, image_feature)


def is_path(data: str) -> bool:
    """Return whether an argument is a folder, an address, or a pattern of tar or Parquet files."""
    return (
        is_address(data)
        or Path(data).is_dir()
        or any(kind.is_pattern(data) for kind in SHARDS.values())
    )


def has_split(path: str, split: str, source_type: str | None = None) -> bool:
    """Return whether there is a subfolder or a file named like a split.

    Args:
      path: a folder, or a pattern of tar or Parquet files; for "hf" the folder of the cache.
      source_type: of the dataset; None: any that can be detected.
    """
    found = {name: kind.has_split(path, split) for name, kind in SHARDS.items()}
    if not is_address(path):
        folder = Path(path)
        files = [folder / f"{split}{suffix}" for suffix in ARRAY_SUFFIXES]
        found["folder"] = (folder / split).is_dir()
        found["arrays"] = any(file.exists() for file in files)
    return any(found.values()) if source_type is None else found[source_type]


def _detect_type(path: str, split: str) -> str:
    """Return the type of a split in a folder, or of a pattern of files.

    Raises:
      DataError: the folder lacks the split, or is a TFDS data_dir.
    """
    for name, kind in SHARDS.items():
        if kind.is_pattern(path):
            return name
    if is_address(path):
        return _detect_remote(path)
    folder = Path(path)
    if split and not has_split(path, split):
        raise DataError(f"{folder / split} does not exist")
    if any(any(folder.glob("*/" * depth + "dataset_info.json")) for depth in range(3)):
        raise DataError(
            f"{folder} is a TFDS directory: give the name of the dataset, and its folder as "
            "--data-dir"
        )
    if not split:
        return _only_shards(path) or "folder"
    for name in ("arrays", *SHARDS):
        if has_split(path, split, name):
            return name
    return "folder"


def _detect_remote(address: str) -> str:
    """Return the type of the shards in a folder of an object store."""
    for name, kind in SHARDS.items():
        if kind.is_in(any_path(address)):
            return name
    kinds = " nor ".join(kind.name for kind in SHARDS.values())
    raise DataError(
        f"{address} has neither {kinds}, which alone are read from an object store: write the "
        "images to tar files, or copy the data to a local disk"
    )


def _only_shards(path: str) -> str | None:
    """Return the type of the shards of a folder without images; None if it has none."""
    return next((name for name, kind in SHARDS.items() if kind.has_only(Path(path))), None)
