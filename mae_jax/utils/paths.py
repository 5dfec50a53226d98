"""Paths that users give, at every door: commands, config keys, Python functions."""

import os
import re
from pathlib import Path

from mae_jax.utils.errors import UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib turns gs://x into gs:/x


def expand_path(path: str | os.PathLike[str]) -> str:
    """Return a path with "~" and "~user" expanded; to expand the result again changes nothing.

    Raises:
      UserError: it is an address such as gs://bucket/run, or the home directory is unknown.
    """
    text = os.fspath(path)
    if address := _ADDRESS.match(text):
        raise UserError(
            f"{text} is no path on this machine: {address[1]}:// is not supported; copy it to a "
            "local disk, or mount it there"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(f"{text}: there is no such home directory; ./{text} names a local file")
    if str(Path(expanded)) != expanded and _is_special(str(Path(expanded))):
        return os.path.abspath(expanded)  # ./~x and ./gs:/x, which pathlib shortens to ~x and gs:/x
    return expanded


def _is_special(text: str) -> bool:
    return text.startswith("~") or _ADDRESS.match(text) is not None


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return `expand_path` as a Path."""
    return Path(expand_path(path))
