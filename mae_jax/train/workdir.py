"""The workdir of a run: locked by one run at a time, and shared by all of its processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mae_jax.distributed import processes
from mae_jax.utils.errors import UserError
from mae_jax.utils.file_lock import LockedError, exclusive_lock


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
    with ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive_lock(_lock_file(workdir)))
        except LockedError as error:
            raise WorkdirError(f"the workdir {workdir} is in use by {error}") from None
        except OSError as error:
            raise _not_writable(workdir, error) from error
        yield


def _not_writable(workdir: Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"cannot write to the workdir {workdir}: {error.strerror}")


def _lock_file(workdir: Path) -> Path:
    return workdir / ".lock"
