"""Checkpoints in object stores: weights files, directories of them, and mirrors of runs."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import hash_lines
from mae_jax.distributed.checkpoint_mirror import (
    FOLDER,
    MANIFEST,
    download_files,
    download_step,
    list_steps,
)
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.caches import cache_folder
from mae_jax.utils.file_lock import exclusive_lock
from mae_jax.utils.remote import RemotePath

log = logging.getLogger("mae_jax")


def fetch(address: str) -> Path:
    """Return the local path of a checkpoint in an object store, downloading it to a cache.

    Args:
      address: of a weights file; of a directory of weights; of the mirror of a run, its folder of
        checkpoints or one step in it.

    Raises:
      ConvertError: there is nothing of that name.
      UserError, RemoteError: it cannot be read.
    """
    path = RemotePath(address)
    if not path.exists():
        raise ConvertError(f"{address} does not exist")
    if not path.is_dir():
        return _fetch_files(path.parent, [path]) / path.name
    for folder in (path / FOLDER, path):
        if steps := list_steps(folder):
            return _fetch_step(folder / str(steps[-1]))
    if (path / MANIFEST).exists():
        return _fetch_step(path)
    return _fetch_files(path, path.walk())


def _fetch_step(step: RemotePath) -> Path:
    """Return a local workdir with a step of a mirror."""
    with _cache_entry([step / MANIFEST]) as workdir:
        folder = workdir / FOLDER / step.name
        if not folder.exists():
            download_step(step, folder)
    return workdir


def _fetch_files(source: RemotePath, files: Sequence[RemotePath]) -> Path:
    """Return a local folder with objects below an address."""
    with _cache_entry(files) as entry:
        folder = entry / source.name
        if not folder.exists():
            log.info("downloading %s: %d files", source, len(files))
            names = [str(file).removeprefix(f"{source}/") for file in files]
            with atomic_path(folder) as part:
                download_files(source, names, part)
    return folder


@contextmanager
def _cache_entry(files: Sequence[RemotePath]) -> Iterator[Path]:
    """Give the folder of the cache for the present versions of files, to one process at a time."""
    cache = cache_folder("checkpoints") or Path(tempfile.mkdtemp())
    lines = [f"{file} {file.stat()}" for file in files]
    entry = cache / hash_lines(lines)
    entry.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(entry / ".lock", wait=True):
        yield entry
