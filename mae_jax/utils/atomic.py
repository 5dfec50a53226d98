"""Files and folders that are there whole or not at all, whatever stops their writing."""

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
    """A temporary neighbour to write to, a file or a folder, which takes the path's place after.

    Folders above are created. In a folder that is there already files are replaced one by one, and
    others stay. Where anything is raised, the temporary neighbour is removed.
    """
    path = Path(os.path.abspath(path))  # "." has no name of its own
    path.parent.mkdir(parents=True, exist_ok=True)
    # The host too: on a shared disk others may write the same, from a process of the same number.
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
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        _remove(part)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
