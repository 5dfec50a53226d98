"""Folders for caches, also without a home directory, as in a container with a random uid."""

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger("mae_jax.run")


def cache_folder(name: str) -> Path | None:
    """Return a folder for a cache, which may be deleted at any time; None if there is no place.

    It lies in ~/.cache/mae_jax (or below XDG_CACHE_HOME), or else in the folder for temporary
    files, which one line in the log then says.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(home):  # "~" remains where the home directory is unknown
        folder = Path(home) / "mae_jax" / name
        if _is_writable(folder):
            return folder
    temporary = _temporary_caches()
    return temporary / name if temporary and _is_writable(temporary / name) else None


def _is_writable(folder: Path) -> bool:
    """Create a folder, and return whether files can be created in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def _temporary_caches() -> Path | None:
    """Return a folder of this user in the folder for temporary files; log it once."""
    try:
        folder = Path(tempfile.gettempdir()) / f"mae_jax-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Caches hold programs: those of a folder that somebody else has put there must not run.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return None
    log.info("there is no writable home directory: caches go to %s", folder)
    return folder
