"""Files of object stores, named by addresses such as s3://bucket/folder/a.tar.

fsspec reads and writes them: s3:// by s3fs, gs:// by gcsfs, which find endpoint and credentials in
the environment and in the files of the vendor's own tools. memory:// is the store of a process, for
tests. Whatever may be transient is tried again, with exponential backoff and full jitter.
"""

import errno
import functools
import io
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path, is_address

log = logging.getLogger("mae_jax")

T = TypeVar("T")

ATTEMPTS = 8  # of an operation; the pauses between them take 26 s on average, 52 s at most
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0  # upper bounds, between which they double
BUFFER = 2**23  # bytes that a reader from beginning to end gets at a time
CONNECTIONS = 64  # of a process to S3; the default of 10 would hold up its reader threads

# Another attempt cannot help.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PERMANENT += (ImportError, RuntimeError, TypeError, ValueError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_TAGS = ("ETag", "etag", "created")  # what an object's information calls its version


class RemoteError(OSError):
    """An object store failed, also after the last attempt; the message says what to do."""

    def __str__(self) -> str:  # whatever file name has been added to it on the way
        return str(self.args[0])


class RemoteStat(NamedTuple):
    """Size of an object in bytes, and a text that is another one when the object changes."""

    st_size: int
    tag: str


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object or a folder of an object store, with the methods of `pathlib.Path` for it.

    Every method raises FileNotFoundError where there is nothing, UserError for what the user must
    fix (credentials, a missing package), and RemoteError when the store keeps failing.

    Args:
      address: as `expand_path` returns it.
    """

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str | Path) -> "RemotePath":
        return RemotePath(f"{self.address}/{name}".rstrip("/"))

    @property
    def scheme(self) -> str:
        return self.address.partition("://")[0]

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.address.rpartition("/")[0])

    def absolute(self) -> "RemotePath":
        return self

    def exists(self) -> bool:
        return self._kind() is not None

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return None

    def stat(self) -> RemoteStat:
        """Return the size and version of an object."""
        info = self._info()
        return RemoteStat(info["size"], str(next((info[x] for x in _TAGS if x in info), "")))

    def _info(self) -> dict[str, Any]:
        return self._attempt("read", lambda store: store.info(self.address))

    def iterdir(self) -> list["RemotePath"]:
        """Return the objects and folders in a folder."""
        return self._paths(lambda store: store.ls(self.address, detail=False))

    def walk(self) -> list["RemotePath"]:
        """Return the objects in a folder and its subfolders, sorted."""
        return self._paths(lambda store: store.find(self.address))

    def glob(self) -> list["RemotePath"]:
        """Return the objects that an address with * and ? names, without hidden ones, sorted."""
        found = self._paths(lambda store: store.glob(self.address))
        return [path for path in found if path.name[0] != "." or self.name[0] == "."]

    def _paths(self, call: Callable[[Any], list[str]]) -> list["RemotePath"]:
        names = self._attempt("list", call)
        paths = {RemotePath(f"{self.scheme}://{name.strip('/')}") for name in names}
        return sorted(paths - {self})  # some stores keep an empty object for a folder

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes of an object from `start` on; fewer if it ends before."""
        if not length:
            return b""
        end = start + length

        def get(store: Any) -> bytes:
            try:
                return store.cat_file(self.address, start=start, end=end)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the object ends before `start`
                    return b""
                raise

        return self._attempt(f"read bytes {start} to {end} of", get)

    def read_bytes(self) -> bytes:
        return self._attempt("read", lambda store: store.cat_file(self.address))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def open(self, mode: str = "rb", buffering: int = BUFFER) -> Any:
        """Return a file object that reads at least `buffering` bytes at a time."""
        assert mode == "rb"
        reader = _RangeReader(self)
        return io.BufferedReader(reader, buffering) if buffering else reader

    def download(self, file: Path) -> None:
        """Write an object to a file."""
        self._attempt("read", lambda store: store.get_file(self.address, str(file)))

    def upload(self, file: Path) -> None:
        """Write a file to an object, which appears when it is complete."""
        self._attempt("write", lambda store: store.put_file(str(file), self.address))

    def write_text(self, text: str) -> None:
        self._attempt("write", lambda store: store.pipe_file(self.address, text.encode()))

    def remove(self) -> None:
        """Remove an object, or a folder with all objects in it, unless there is none."""
        with suppress(FileNotFoundError):
            self._attempt("remove", lambda store: store.rm(self.address, recursive=True))

    def _attempt(self, what: str, call: Callable[[Any], T]) -> T:
        """Return the result of a call on the store, which is made up to ATTEMPTS times."""
        store = _store(self.scheme, os.getpid())
        import tenacity

        def log_retry(state: Any) -> None:
            log.info(
                "cannot %s %s, attempt %d of %d: %s",
                *(what, self, state.attempt_number, ATTEMPTS),
                _reason(state.outcome.exception()),
            )

        try:
            return tenacity.Retrying(
                stop=tenacity.stop_after_attempt(ATTEMPTS),
                wait=tenacity.wait_random_exponential(FIRST_PAUSE_S, LONGEST_PAUSE_S),
                retry=tenacity.retry_if_exception(_is_transient),
                before_sleep=log_retry,
                reraise=True,
            )(call, store)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "does not exist", str(self)) from error
        except Exception as error:  # stores have no common base class
            if _is_transient(error):
                raise RemoteError(
                    f"cannot {what} {self}, after {ATTEMPTS} attempts: {_reason(error)}. Check the "
                    "network and the store, then give the same command again"
                ) from error
            raise UserError(
                f"cannot {what} {self}: {_reason(error)}. Check the address, and the credentials "
                "in the environment of this process (docs/data.md)"
            ) from error


class _RangeReader(io.RawIOBase):
    """A file object that gets every range of bytes by a request of its own."""

    def __init__(self, path: RemotePath):
        super().__init__()
        self._path, self._size, self._position = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._position), 0)
        data = self._path.read(self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@functools.cache
def _store(scheme: str, pid: int) -> Any:
    """Return the file system of a scheme in this process: its connections do not survive a fork."""
    del pid
    options: dict[str, Any] = {}
    if scheme == "s3":  # `_attempt` alone tries again
        retries = {"total_max_attempts": 1}
        options["config_kwargs"] = {"retries": retries, "max_pool_connections": CONNECTIONS}
    try:
        import fsspec
        import tenacity  # noqa: F401

        store = fsspec.filesystem(
            scheme, skip_instance_cache=True, use_listings_cache=False, **options
        )
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs more packages: pip install 'mae_jax[{scheme}]' ({error})"
        ) from error
    if scheme == "s3":
        store.retries = 1
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its tracebacks: `_attempt` reports
    return store


def _is_transient(error: BaseException) -> bool:
    permanent = isinstance(error, _PERMANENT) or not isinstance(error, Exception)
    return not permanent and type(error).__name__ not in _NO_CREDENTIALS


def _reason(error: BaseException | None) -> str:
    """Return an error on one line, without the credentials that a URL in it may have."""
    text = re.sub(r"//[^/\s@]*@", "//", str(error).strip() or repr(error))
    return re.sub(r"\?\S+", "", text.splitlines()[0])[:300].rstrip(".")


AnyPath = Path | RemotePath


def any_path(path: str | os.PathLike[str]) -> AnyPath:
    """Return the path that a text names, on this machine or in an object store."""
    text = expand_path(path, remote=True)
    return RemotePath(text) if is_address(text) else Path(text)
