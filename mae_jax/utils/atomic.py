"""Atomic and durable writes of files and directories."""

import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mae_jax.utils.errors import UserError
from mae_jax.utils.file_lock import pid_namespace, process_exists

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of disks that cannot sync a folder


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path for a file or folder to write, and rename it to `path` at the end.

    Parent folders are created; of a symlink, the target is written. If `path` is an existing
    folder, its files are replaced one by one, and other files in it stay. If the block raises, the
    temporary file or folder is removed; that of a killed process is removed by the next one. What
    was written is on the disk before the rename: after a power failure, `path` is old or new,
    never empty.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the host name: on a shared disk, processes of other hosts may have the same id.
    namespace = "".join(filter(str.isdecimal, pid_namespace()))
    prefix = f".{path.name[:40]}.{socket.gethostname()}.{namespace}."
    part = path.with_name(f"{prefix}{os.getpid()}.part")
    _remove(part)
    _remove_abandoned(path.parent, prefix)
    try:
        yield part
        _sync(part)
        if path.is_dir() and part.is_dir():
            _replace_files(path, part)
        else:
            part.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # missing if the disk is full
        raise
    finally:
        _remove(part)


def check_writable(name: str, path: Path) -> None:
    """Check before any work is done that a file or folder can be written; leaves nothing behind.

    Args:
      name: of the flag, for errors.

    Raises:
      UserError: `path` is a broken symlink, a device or the like, or its folder is not writable.
    """
    try:
        if not path.exists() and (link := next(filter(_is_broken, [path, *path.parents]), None)):
            raise UserError(
                f"{name} {path}: {link} is a symlink to {link.readlink()}, which is no file"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{name} {path} is neither a file nor a folder")
        target = Path(os.path.realpath(path))
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir():
            raise UserError(f"{name} {path}: {parent} is a file, not a directory")
        longest = max(len(os.fsencode(part)) for part in target.parts)
        if longest > (limit := os.pathconf(parent, "PC_NAME_MAX")):
            raise UserError(f"{name} {path}: a name has {longest} bytes, more than {limit}")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"{name} {path} cannot be written: {error.strerror or error}") from error


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _replace_files(path: Path, part: Path) -> None:
    """Move the files of the folder `part` to the folder `path`, one process at a time.

    The largest one, of the weights, is removed first and comes last: a process that is killed in
    between leaves no weights, rather than weights and a config that do not belong together.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        files = sorted(part.iterdir(), key=lambda file: file.stat().st_size)
        for file in files[-1:]:
            (path / file.name).unlink(missing_ok=True)
        for file in files:
            file.replace(path / file.name)
    finally:
        os.close(folder)
    _sync_folder(path)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder and the files in it, are on the disk."""
    files = list(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if path.is_dir():
        _sync_folder(path)


def _sync_folder(path: Path) -> None:
    """Wait until the names of the files in a folder are on the disk, if the disk can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the temporary files of killed processes of this host."""
    with suppress(OSError):  # the folder may be unreadable, or another process do the same
        for file in folder.iterdir():
            pid = file.name.removeprefix(prefix).removesuffix(".part")
            ours = file.name == f"{prefix}{pid}.part" and pid.isdecimal()
            if ours and not process_exists(int(pid)):
                _remove(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
