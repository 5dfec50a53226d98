"""Images in a column of Parquet files, or of the Arrow files that huggingface `datasets` caches.

A column of images is of structs {bytes, path}, as the Hugging Face hub has them, or of bytes.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mae_jax.data.shard_index import file_version
from mae_jax.data.sources import MAX_CLASSES, DataError, Record, hash_lines, printable_path
from mae_jax.utils.remote import AnyPath, RemoteError, RemotePath

log = logging.getLogger("mae_jax")

T = TypeVar("T")

CACHED_GROUPS = 8  # row groups that a process keeps
THREADS = 16  # that read footers and labels: they mostly wait for the disk or the network
MAX_GROUP_ROWS = 200  # images per row group, above which reading in random order is slow


@dataclass(frozen=True)
class _Block:
    """Rows of a file that are read together: a row group of Parquet, all of an Arrow file."""

    path: AnyPath
    group: int | None
    rows: int
    version: tuple[int, int | str]  # of the file


class TableSource:
    """The images of Parquet or Arrow files, in their order.

    Args:
      files: of one kind, with the same columns.
      classes: of the training split, which those of the files must equal.
      image: name of the image column; "image" also takes the only column of images.

    Raises:
      DataError: a file cannot be read, there is no such column, or the classes differ.
    """

    def __init__(
        self, files: Sequence[AnyPath], classes: tuple[str, ...] = (), image: str = "image"
    ):
        tables = _in_threads(_describe, files)
        self._blocks = [block for table in tables for block in table.blocks]
        self._starts = np.cumsum([0, *(block.rows for block in self._blocks)])
        if not len(self):
            raise DataError(f"no images in {', '.join(map(str, files))}")
        self._image = _image_column(files[0], tables[0], image)
        label = _label_column(tables[0])
        for path, table in zip(files, tables):
            _check_same_columns(path, table, files[0], tables[0], image)
        self._labels = np.full(len(self), -1)
        if label is None:
            _log_unread_labels(files[0], tables[0])
        else:
            read = functools.partial(_read_labels, column=label)
            self._labels = np.concatenate(_in_threads(read, files))
        if self._labels.max() >= MAX_CLASSES:
            log.warning("no class labels: %s has label %d", files[0], self._labels.max())
            self._labels[:] = -1
        self.classes = _class_names(files[0], tables[0], label, self._labels, classes)
        self._sizes = _in_threads(lambda path: path.stat().st_size, files)
        _warn_of_large_groups(self._blocks)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int) -> tuple[_Block, int]:
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._blocks[block], index - int(self._starts[block])

    def __getitem__(self, index: int) -> Record:
        block, row = self._locate(index)
        value = _read_column(block, self._image)[row].as_py()
        return {"image": _image_bytes(value, block.path), "label": self.label(index)}

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def describe(self, index: int) -> str:
        block, _ = self._locate(index)
        first = next(i for i, other in enumerate(self._blocks) if other.path == block.path)
        return f"row {index - int(self._starts[first])} of {printable_path(block.path)}"

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and numbers of rows of the files."""
        blocks = [f"{block.path.name} {block.group} {block.rows}" for block in self._blocks]
        return hash_lines([*blocks, *map(str, self._sizes)])


@dataclass(frozen=True)
class _Table:
    """What is known of a file without reading its rows; `features` as the hub describes them."""

    schema: Any
    features: dict[str, Any]
    blocks: list[_Block]


def _in_threads(function: Callable[[AnyPath], T], files: Sequence[AnyPath]) -> list[T]:
    """Return the results of a function for all files, in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, files))


@contextlib.contextmanager
def _errors(path: AnyPath) -> Iterator[None]:
    """Name the file in the errors of pyarrow."""
    try:
        yield
    except RemoteError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read: {reason}") from error


def _describe(path: AnyPath) -> _Table:
    with _errors(path):
        version = file_version(path)
        if path.suffix == ".arrow":
            table = _map_arrow(path)
            schema, blocks = table.schema, [_Block(path, None, table.num_rows, version)]
        else:
            file = _open_parquet(path)
            schema, metadata = file.schema_arrow, file.metadata
            groups = range(metadata.num_row_groups)
            blocks = [_Block(path, i, metadata.row_group(i).num_rows, version) for i in groups]
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return _Table(schema, described.get("info", {}).get("features", {}), blocks)


def _open_parquet(path: AnyPath) -> Any:
    if isinstance(path, Path):
        return pq.ParquetFile(path)
    return pq.ParquetFile(path.open(buffering=0), metadata=_footer(path), pre_buffer=True)


@functools.cache
def _footer(path: RemotePath) -> Any:
    return pq.read_metadata(path.open(buffering=0))


@functools.cache
def _map_arrow(path: AnyPath) -> Any:
    """Return the table of an Arrow file, which stays on the disk until it is read."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


@functools.lru_cache(CACHED_GROUPS)
def _read_column(block: _Block, column: str) -> Any:
    path = block.path
    with _errors(path):
        if file_version(path) != block.version:
            raise DataError(f"{path} has changed since it was opened: start again")
        if block.group is None:
            return _map_arrow(path)[column]
        file = _open_parquet(path)
        return file.read_row_group(block.group, columns=[column], use_threads=False)[column]


def _read_labels(path: AnyPath, column: str) -> np.ndarray:
    with _errors(path):
        if path.suffix == ".arrow":
            values = _map_arrow(path)[column]
        else:
            values = _open_parquet(path).read(columns=[column])[column]
        labels = values.cast("int64").fill_null(-1).to_numpy()
    return np.maximum(labels, -1)


def _image_column(path: AnyPath, table: _Table, name: str) -> str:
    """Return the name of the column of images.

    Raises:
      DataError: there is none, or there are several and none has the name.
    """
    columns = [field.name for field in table.schema if _holds_images(field.type)]
    if name in columns:
        return name
    if len(columns) == 1 and name == "image":
        return columns[0]
    found = f"its columns of images are {', '.join(columns)}" if columns else "it has none"
    raise DataError(
        f"is not a column of images of {path}: {found}", key="data.image_feature", value=name
    )


def _holds_images(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(table: _Table) -> str | None:
    """Return the name of the column of labels: "label", or the only one of class labels."""
    names = _class_label_columns(table)
    if "label" in table.schema.names and pa.types.is_integer(table.schema.field("label").type):
        return "label"
    return names[0] if len(names) == 1 else None


def _check_same_columns(
    path: AnyPath, table: _Table, first: AnyPath, first_table: _Table, image: str
) -> None:
    """Raise DataError if the columns or the classes of a file are not those of the first."""
    label = _label_column(first_table)
    get_names = lambda x: label and x.features.get(label, {}).get("names")
    names, first_names = get_names(table), get_names(first_table)
    same_classes = not names or not first_names or names == first_names
    same_image = _image_column(path, table, image) == _image_column(first, first_table, image)
    if _label_column(table) != label or not same_classes or not same_image:
        raise DataError(f"{path} has other columns or classes than {first}")


def _log_unread_labels(path: AnyPath, table: _Table) -> None:
    """Log why a file has no labels, although it seems to have some."""
    if "label" in table.schema.names:
        kind = table.schema.field("label").type
        log.warning("no class labels: the column label of %s is %s, not integers", path, kind)
    elif several := _class_label_columns(table):
        log.warning("no class labels: %s has several, %s", path, ", ".join(several))


def _class_label_columns(table: _Table) -> list[str]:
    is_label = lambda x: isinstance(x, dict) and x.get("_type") == "ClassLabel"
    return [name for name in table.schema.names if is_label(table.features.get(name))]


def _class_names(
    path: AnyPath,
    table: _Table,
    column: str | None,
    labels: np.ndarray,
    classes: tuple[str, ...],
) -> tuple[str, ...]:
    """Return the names of the classes: of the hub's metadata, of training, or numbers.

    Raises:
      DataError: they are not those of training, or too few.
    """
    count = int(labels.max()) + 1
    if column is None or not count:
        return ()
    names = tuple(table.features.get(column, {}).get("names", ()))
    if names and classes and names != classes:
        raise DataError(
            f"{path} has the classes {', '.join(names)}, but training has {', '.join(classes)}"
        )
    names = names or classes or tuple(map(str, range(count)))
    if count > len(names):
        raise DataError(f"{path}: label {count - 1}, but there are {len(names)} class names")
    return names


def _image_bytes(value: Any, path: AnyPath) -> bytes:
    """Return the encoded image of a cell; a cell without bytes has the path of a file.

    Raises:
      DataError: it has neither, or the file cannot be read.
    """
    if isinstance(value, bytes):
        return value
    if value is None:
        raise DataError("the cell is empty")
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        return (path.parent / value["path"]).read_bytes()
    except RemoteError:
        raise
    except (OSError, TypeError) as error:
        raise DataError(f"its cell has no bytes, and no file {value['path']}") from error


def _warn_of_large_groups(blocks: Sequence[_Block]) -> None:
    rows = max(block.rows for block in blocks)
    if isinstance(blocks[0].path, RemotePath) and rows > 1:
        log.warning(
            "%s: to get one image, its row group of up to %d images is read over the network: copy "
            "the files to a local disk, or set data.in_memory=True",
            blocks[0].path,
            rows,
        )
        return
    if blocks[0].group is not None and rows > MAX_GROUP_ROWS:
        log.warning(
            "%s has row groups of %d images, each of which is read to get one image: in random "
            "order that is slow. Write it with row_group_size=100, or use mae-jax data cache",
            blocks[0].path,
            rows,
        )
