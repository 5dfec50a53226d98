"""Random access to the records of TFRecord files, without TensorFlow.

A record is its length (uint64), a checksum of the length (uint32), its data, and a checksum of the
data (uint32), all little-endian. Since the format has no index, each file is scanned once for the
offsets of its records, which are cached. Checksums are not verified: corrupt data is detected when
a record is parsed or its image decoded.
"""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_jax.data.shard_index import Shards
from mae_jax.data.sources import DataError

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
        self._files = Shards([shard.path for shard in shards], "TFRecord files")
        indices = self._files.indices(lambda number: _index_shard(shards[number]), index_dir)
        spans = [index[shard.first : shard.last] for shard, index in zip(shards, indices)]
        self._file = np.repeat(np.arange(len(spans)), [len(rows) for rows in spans])
        self._span = np.concatenate(spans)

    def __len__(self) -> int:
        return len(self._span)

    def __getitem__(self, index: int) -> bytes:
        return self._files.read(int(self._file[index]), *map(int, self._span[index]))


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
