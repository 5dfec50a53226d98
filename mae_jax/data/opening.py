"""A source by its kind."""

from pathlib import Path

from mae_jax.data.memory import read_arrays
from mae_jax.data.sources import DataError, FolderSource, Source

KINDS = ("tfds", "folder", "arrays")


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
        from mae_jax.data.tfds_source import TfdsSource  # heavy, and not always needed

        return TfdsSource(name, split, path, image, index_dir)
    if kind not in KINDS:
        raise DataError(f"data.source={kind!r}; use one of {', '.join(KINDS)}")
    if not path:
        raise DataError(f"data.source={kind!r} needs data.path, the folder that it is in")
    if kind == "arrays":
        return read_arrays(path, split, classes)
    return FolderSource(path, split, classes)
