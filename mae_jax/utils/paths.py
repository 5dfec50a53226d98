"""Paths that users give, at every door: commands, config keys, Python functions."""

import os
import re
from pathlib import Path

from mae_jax.utils.errors import UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib turns gs://x into gs:/x
STORES = ("s3", "gs", "memory")  # schemes of object stores; memory is for tests


def expand_path(path: str | os.PathLike[str], *, remote: bool = False) -> str:
    """Return a path with "~" and "~user" expanded; to expand the result again changes nothing.

    Args:
      remote: addresses of object stores, as s3://bucket/run, are allowed.

    Raises:
      UserError: it is another address, or has credentials in it; or the home directory is unknown.
    """
    text = os.fspath(path)
    if address := _ADDRESS.match(text):
        if remote and address[1].lower() in STORES:
            return _clean_address(address[1].lower(), text[address.end() :])
        text = _without_user(text)
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


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is an address, of an object store or of anything else."""
    return _ADDRESS.match(os.fspath(path)) is not None


def _clean_address(scheme: str, rest: str) -> str:
    """Return an address without a slash at its end.

    Raises:
      UserError: it has no bucket, or has credentials in it.
    """
    bucket, _, name = rest.strip("/").partition("/")
    if "@" in bucket:
        raise UserError(
            f"{_without_user(f'{scheme}://{bucket}/{name}')} was given with credentials in it, "
            "which others can read in the list of processes and in logs: set them in the "
            "environment, as AWS_ACCESS_KEY_ID, or in the files of the tools of the store"
        )
    if not bucket:
        raise UserError(f"{scheme}:// needs the name of a bucket, as in {scheme}://bucket/folder")
    return f"{scheme}://{bucket}/{name}".rstrip("/")


def _without_user(address: str) -> str:
    return re.sub(r":/+[^/]*@", "://", address)


def _is_special(text: str) -> bool:
    return text.startswith("~") or _ADDRESS.match(text) is not None


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return `expand_path` as a Path."""
    return Path(expand_path(path))
