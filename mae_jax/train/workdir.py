"""The workdir of a run: locked by one run at a time, and shared by all of its processes."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mae_jax.distributed import processes
from mae_jax.utils.errors import UserError


class WorkdirError(UserError):
    """A workdir cannot be used; the message has the reason and the remedy."""


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Create a workdir and lock it for this run.

    Raises:
      WorkdirError: another run holds it, it is not writable, or the processes see different ones.
    """
    with ExitStack() as stack:
        with processes.raise_together():
            if processes.is_main():
                stack.enter_context(_lock(workdir))
        try:
            owner = _lock_file(workdir).read_text()
        except OSError:
            owner = ""
        try:
            processes.assert_equal_across_processes({f"workdir {workdir}": owner})
        except UserError as error:
            raise WorkdirError(
                f"{error}. It must be on a disk that all hosts share, because all of them write "
                "checkpoints"
            ) from error
        yield


@contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(_lock_file(workdir), "ab+", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise _not_writable(workdir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = (file.read() or b"").decode().strip() or "another process"
            raise WorkdirError(f"the workdir {workdir} is in use by {owner}") from None
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            os.fsync(file.fileno())
        except OSError as error:
            raise _not_writable(workdir, error) from error
        yield


def _not_writable(workdir: Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"cannot write to the workdir {workdir}: {error.strerror}")


def _lock_file(workdir: Path) -> Path:
    return workdir / ".lock"
