"""Random access to records in large files (shards) whose places are indexed once.

An index is an int64 array with a row per record. It is cached under the sizes and modification
times of the files, and a file that changes while it is read is an error. Of an object in a store,
the version counts (its ETag); between two runs a change is found, during a run one of the length.
"""

import logging
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Int

from mae_jax.data.sources import DataError, hash_lines
from mae_jax.utils import console
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.remote import AnyPath, RemotePath

log = logging.getLogger("mae_jax")

THREADS = 16  # that index files: they mostly wait for the disk or the network

Index = Int[np.ndarray, "records columns"]


class Shards:
    """Files of records.

    Args:
      paths: in order.
      kind: what they are, for messages, as "TFRecord files".

    Raises:
      DataError: a file does not exist.
    """

    def __init__(self, paths: Sequence[AnyPath], kind: str):
        self.paths, self.kind = list(paths), kind
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                self._versions = list(pool.map(file_version, self.paths))
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} does not exist") from error

    def indices(
        self,
        index_file: Callable[[int], Index],
        index_dir: Path | None,
        settings: Sequence[str] = (),
    ) -> list[Index]:
        """Return the index of every file: from the cache, or computed with a progress bar.

        Args:
          index_file: returns the index of a file by its number.
          index_dir: where the indices are cached; None caches nothing.
          settings: what else the indices depend on.
        """
        lines = [
            f"{path.absolute()} {size} {version}"
            for path, (size, version) in zip(self.paths, self._versions)
        ]
        cache = None
        if index_dir:
            name = self.paths[0].name.split("-")[0]
            cache = index_dir / f"{name}-{hash_lines([*lines, *settings])}.npz"
        if cache and cache.exists():
            try:
                with cache.open("rb") as file, np.load(file) as arrays:
                    return [arrays[str(number)] for number in range(len(self.paths))]
            except (OSError, ValueError, KeyError, BadZipFile, zlib.error) as error:
                log.warning("%s is damaged, and made again: %s", cache, error)
        count = len(self.paths)
        log.info("indexing %d %s", count, self.kind)
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                computed = pool.map(index_file, range(count))
                indices = list(console.progress(computed, count, "files"))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if cache:
            self._save(cache, indices)
        return indices

    def _save(self, path: Path, indices: Sequence[Index]) -> None:
        arrays: Any = {str(number): index for number, index in enumerate(indices)}
        try:
            with atomic_path(path) as part, part.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
        except OSError as error:
            log.warning("cannot cache the index of %s: %s", self.kind, error)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a file by its number.

        Raises:
          DataError: it cannot be read, or has changed since it was indexed.
          RemoteError: the store that has it keeps failing.
        """
        path = self.paths[number]
        if isinstance(path, RemotePath):
            version, data = self._versions[number], _read_object(path, offset, length)
        else:
            version, data = _read_file(path, offset, length)
        if version != self._versions[number] or len(data) != length:
            raise DataError(f"{path} has changed since it was indexed: start again to index it")
        return data


def _read_object(path: RemotePath, offset: int, length: int) -> bytes:
    try:
        return path.read(offset, length)
    except FileNotFoundError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _read_file(path: Path, offset: int, length: int) -> tuple[tuple[int, int], bytes]:
    """Return the version of a file, and bytes of it."""
    try:
        # Opened for each record: there may be more files than a process may keep open.
        with path.open("rb", buffering=0) as file:
            version = _version(os.fstat(file.fileno()))
            return version, os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def file_version(path: AnyPath) -> tuple[int, int | str]:
    """Return the size of a file and a value that changes with it."""
    return path.stat() if isinstance(path, RemotePath) else _version(path.stat())


def _version(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
