"""Folders whose path means something else to libraries that glob, or look for addresses in it.

Orbax finds the files of each process by glob.glob(f"{folder}/ocdbt.process_*"). Below a folder like
"lr[1e-4]" that matches nothing, and it writes checkpoints that nobody can read. A folder "gs:" in a
path becomes "gs://".
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae_jax.utils.errors import UserError

_DESCRIPTORS = Path("/proc/self/fd")  # of Linux


@contextmanager
def glob_safe(folder: Path) -> Iterator[Path]:
    """Give an absolute path of a folder without "[", "*", "?" and ":/"; such a folder is created.

    Raises:
      UserError: the system has no other name for it.
    """
    folder = folder.absolute()
    if glob.escape(str(folder)) == str(folder) and ":/" not in str(folder):
        yield folder
        return
    if not _DESCRIPTORS.is_dir():
        raise UserError(f"{folder}: choose a path without the characters [ * ? :")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _DESCRIPTORS / str(descriptor)
    finally:
        os.close(descriptor)


def name_folders(text: str) -> str:
    """Return a message with the names of folders in place of those that `glob_safe` gives."""
    return re.sub(rf"{_DESCRIPTORS}/\d+", lambda match: _target(match[0]), text)


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return link
