"""Random access to the records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of that (uint32), its bytes, and a checksum of them
(uint32), all little-endian. Nothing says where records begin, so files are walked once, from length
to length; where each record lies is then kept in an index. Checksums are not looked at: what is
damaged shows when a record is parsed, or its image decoded.
"""

import logging
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_jax.data.sources import DataError, fingerprint_of
from mae_jax.utils import console
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax")

BEFORE, AFTER = 12, 4  # bytes around the data of a record


@dataclass(frozen=True)
class Shard:
    """A file said to hold `records` records, of which those from `first` up to `last` are read."""

    path: Path
    records: int
    first: int
    last: int


class TfRecords:
    """The bytes of records by number.

    Args:
      shards: in order.
      index_dir: where to keep the index; None keeps none.

    Raises:
      DataError: a file is missing, cut off, or has another number of records than said.
    """

    def __init__(self, shards: Sequence[Shard], index_dir: Path | None = None):
        self._paths = [shard.path for shard in shards]
        places = [index[shard.first : shard.last] for shard, index in _indices(shards, index_dir)]
        self._file = np.repeat(np.arange(len(places)), [len(part) for part in places])
        self._place = np.concatenate(places)

    def __len__(self) -> int:
        return len(self._place)

    def __getitem__(self, index: int) -> bytes:
        begin, length = map(int, self._place[index])
        path = self._paths[self._file[index]]
        # Opened anew each time: there are often more files than a process may keep open.
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, begin)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != length:
            raise DataError(f"{path} has been cut off since it was indexed")
        return data


def _indices(shards: Sequence[Shard], index_dir: Path | None) -> Iterable[tuple[Shard, np.ndarray]]:
    """The index of each file, taken from the folder of indices where it is there already."""
    try:
        stats = [shard.path.stat() for shard in shards]
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist") from error
    lines = [
        f"{shard.path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
        for shard, stat in zip(shards, stats)
    ]
    kept = (
        index_dir and index_dir / f"{shards[0].path.name.split('-')[0]}-{fingerprint_of(lines)}.npz"
    )
    if kept and kept.exists():
        with np.load(kept) as arrays:
            yield from ((shard, arrays[str(n)]) for n, shard in enumerate(shards))
        return
    log.info("looking for where records begin in TFRecord files: %d", len(shards))
    found = list(console.progress(map(_index, shards), len(shards), "files"))
    if kept:
        _keep(kept, found)
    yield from zip(shards, found)


def _keep(path: Path, found: Sequence[np.ndarray]) -> None:
    try:
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **{str(n): index for n, index in enumerate(found)})
    except OSError as error:
        log.warning("the index could not be kept, and will be made again: %s", error)


def _index(shard: Shard) -> np.ndarray:
    """Begin and length of the data of every record, [records, 2]."""
    places = []
    size = shard.path.stat().st_size
    with shard.path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        at = 0
        while at < size:
            length = struct.unpack_from("<Q", view, at)[0] if at + BEFORE <= size else size
            end = at + BEFORE + length + AFTER
            if end > size:
                raise DataError(f"{shard.path} is cut off, or no TFRecord, at record {len(places)}")
            places.append((at + BEFORE, length))
            at = end
    if len(places) != shard.records:
        raise DataError(
            f"{shard.path} has {len(places)} records, but its data set says {shard.records}: copy "
            "or prepare it anew"
        )
    return np.array(places, np.int64).reshape(-1, 2)
