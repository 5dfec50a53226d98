"""Exclusive locks on files, also on disks without flock."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 300.0
POLL_SECONDS = 0.5
RELEASED = "released"

log = logging.getLogger("mae_jax")


class LockedError(Exception):
    """Another process holds the lock; the message names it."""


@contextmanager
def exclusive_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of the file `path`, which is created in its existing folder.

    On a disk without flock, files `path`.1, .2, ... take its place, with a warning.

    Args:
      wait: until the lock is free.

    Raises:
      LockedError: another process holds it, and `wait` is false.
      OSError: the folder is not writable.
    """
    with open(path, "ab+", buffering=0) as file:
        works = _flock(path, file.fileno(), wait)
        if works and (owner := _holder(path)) and not wait:  # another host has no flock
            raise LockedError(owner)
        with nullcontext() if works else _lock_file(path, wait):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            os.fsync(file.fileno())
            yield


def _flock(path: Path, file: int, wait: bool) -> bool:
    """Lock an open file; return whether its disk has locks.

    Raises:
      LockedError: another process holds it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            raise LockedError(path.read_text().strip() or "another process") from None
        reason = f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}"
        log.warning("%s cannot be locked by flock (%s): lock files are used instead", path, reason)
        return False
    return True


@contextmanager
def _lock_file(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock by the file `path`.N with the highest N, renewed by a thread."""
    while True:
        try:
            held = _take(path)
            break
        except LockedError:
            if not wait:
                raise
            time.sleep(POLL_SECONDS)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(path, held, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _release(held)


def _release(held: Path) -> None:
    try:
        held.write_text(RELEASED)
    except OSError as error:  # such as a full disk; it is stale when this process has ended
        log.warning("cannot release the lock file %s: %s", held, error)


def _take(path: Path) -> Path:
    """Create the lock file after the last one, if that is released or stale.

    The last file is never removed, so of several processes that find it stale, one creates the
    next; a slower one sees a later file than its own.

    Raises:
      LockedError: another process holds the lock.
    """
    last = _last(path)
    if owner := _holder(path):
        raise LockedError(owner)
    mine = path.with_name(f"{path.name}.{last + 1}")
    try:
        with open(mine, "x") as file:
            json.dump(
                {"host": socket.gethostname(), "pid": os.getpid(), "pids": pid_namespace()}, file
            )
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise LockedError("another process") from None
    except OSError:  # such as a full disk
        mine.unlink(missing_ok=True)
        raise
    if _last(path) != last + 1:
        mine.unlink(missing_ok=True)
        raise LockedError("another process")
    for number in _numbers(path):
        if number <= last:
            path.with_name(f"{path.name}.{number}").unlink(missing_ok=True)
    return mine


def _holder(path: Path) -> str | None:
    """Return who holds the last lock file; None if it is released or stale, or there is none."""
    if not (last := _last(path)):
        return None
    file = path.with_name(f"{path.name}.{last}")
    try:
        text, renewed = file.read_text(), file.stat().st_mtime
    except FileNotFoundError:  # taken over meanwhile
        return "another process"
    if text == RELEASED or _disk_time(path) - renewed > STALE_SECONDS:
        return None
    try:
        owner = json.loads(text)
        here = owner["host"] == socket.gethostname() and owner["pids"] == pid_namespace()
        if here and not process_exists(owner["pid"]):
            return None
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, TypeError, KeyError):  # not written yet, or by somebody else
        return "another process"


def _disk_time(path: Path) -> float:
    """Return the time by the clock of the disk, which may differ from that of this host."""
    os.utime(path)
    return path.stat().st_mtime


def process_exists(pid: int) -> bool:
    """Return whether this host and name space has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def pid_namespace() -> str:
    """Return the name space of process ids: containers of a host number processes themselves."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _numbers(path: Path) -> list[int]:
    endings = [name.removeprefix(f"{path.name}.") for name in os.listdir(path.parent)]
    return [int(ending) for ending in endings if ending.isdecimal()]


def _last(path: Path) -> int:
    return max(_numbers(path), default=0)


def _renew(path: Path, held: Path, stop: threading.Event) -> None:
    """Renew a lock file until `stop`; end the process if another one took it over."""
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            if _last(path) > int(held.suffix[1:]):
                log.critical("another process took over %s while this one was suspended", held)
                os._exit(1)
            os.utime(held)
        except OSError as error:
            log.warning("cannot renew the lock file %s: %s", held, error)
