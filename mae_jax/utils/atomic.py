"""Atomic file and directory writes."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path for a file or folder to write, and rename it to `path` at the end.

    Parent folders are created. If `path` is an existing folder, its files are replaced one by one,
    and other files in it stay. If the block raises, the temporary file or folder is removed.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the host name: on a shared disk, processes of other hosts may have the same id.
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    _remove(part)
    try:
        yield part
        if path.is_dir() and part.is_dir():
            for file in part.iterdir():
                file.replace(path / file.name)
        else:
            part.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # missing if the disk is full
        raise
    finally:
        _remove(part)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
