"""Random access to the records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of the length (uint32), its data, and a checksum of the
data (uint32), all little-endian. Since the format has no index, each file is scanned once for the
offsets of its records, which are cached. Checksums are not verified: corrupt data is detected when
a record is parsed or its image decoded.
"""

import logging
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_jax.data.sources import DataError, hash_lines
from mae_jax.utils import console
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax")

HEADER_BYTES, FOOTER_BYTES = 12, 4  # around the data of a record


@dataclass(frozen=True)
class Shard:
    """A file with `records` records, of which those in [first, last) are read."""

    path: Path
    records: int
    first: int
    last: int


class TfRecordReader:
    """Reads the bytes of records by index.

    Args:
      shards: in order.
      index_dir: where the index of record offsets is cached; None caches nothing.

    Raises:
      DataError: a file is missing, truncated, or has another number of records than its shard.
    """

    def __init__(self, shards: Sequence[Shard], index_dir: Path | None = None):
        self._paths = [shard.path for shard in shards]
        spans = [index[shard.first : shard.last] for shard, index in _indices(shards, index_dir)]
        self._file = np.repeat(np.arange(len(spans)), [len(rows) for rows in spans])
        self._span = np.concatenate(spans)

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, index: int) -> bytes:
        offset, length = map(int, self._span[index])
        path = self._paths[self._file[index]]
        # Opened for each record: there may be more files than a process may keep open.
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != length:
            raise DataError(f"{path} was truncated after it was indexed")
        return data


def _indices(shards: Sequence[Shard], index_dir: Path | None) -> Iterable[tuple[Shard, np.ndarray]]:
    """Yield each shard with the offset and length of its records, [records, 2]; cached."""
    try:
        stats = [shard.path.stat() for shard in shards]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist") from error
    lines = [
        f"{shard.path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        for shard, stat in zip(shards, stats)
    ]
    cache = None
    if index_dir:
        cache = index_dir / f"{shards[0].path.name.split('-')[0]}-{hash_lines(lines)}.npz"
    if cache and cache.exists():
        with np.load(cache) as arrays:
            yield from ((shard, arrays[str(n)]) for n, shard in enumerate(shards))
        return
    log.info("indexing %d TFRecord files", len(shards))
    indices = list(console.progress(map(_index_shard, shards), len(shards), "files"))
    if cache:
        _save_indices(cache, indices)
    yield from zip(shards, indices)


def _save_indices(path: Path, indices: Sequence[np.ndarray]) -> None:
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **{str(n): index for n, index in enumerate(indices)})
    except OSError as error:
        log.warning("cannot cache the index of TFRecord files: %s", error)


def _index_shard(shard: Shard) -> np.ndarray:
    """Return the offset and length of the data of every record, [records, 2]."""
    spans = []
    size = shard.path.stat().st_size
    with shard.path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        offset = 0
        while offset < size:
            data = offset + HEADER_BYTES
            length = struct.unpack_from("<Q", view, offset)[0] if data <= size else size
            end = data + length + FOOTER_BYTES
            if end > size:
                raise DataError(
                    f"{shard.path} is truncated, or not a TFRecord file, at record {len(spans)}"
                )
            spans.append((data, length))
            offset = end
    if len(spans) != shard.records:
        raise DataError(
            f"{shard.path} has {len(spans)} records, but {shard.records} according to its "
            "dataset_info.json: copy or prepare the dataset again"
        )
    return np.array(spans, np.int64).reshape(-1, 2)
