import errno
import os
import subprocess
import sys

import pytest

from mae_jax.utils import file_lock
from mae_jax.utils.file_lock import LockedError, exclusive_lock

HOLD = """
import fcntl, pathlib, sys
def flock(*_):
    raise OSError(95, "Operation not supported")
fcntl.flock = flock
from mae_jax.utils.file_lock import *
try:
    with exclusive_lock(pathlib.Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.read()
except LockedError as error:
    print(error, flush=True)
"""


def hold(path):
    command = [sys.executable, "-c", HOLD, str(path)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)


def without_flock(monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_lock.fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOTSUP", "ENOSYS", "ENOLCK", "EBADF", "EIO", "EINTR"])
def test_other_errors_than_contention_are_named_and_lock_files_used(
    tmp_path, monkeypatch, caplog, name
):
    without_flock(monkeypatch, getattr(errno, name))
    path = tmp_path / ".lock"
    for _ in range(3):
        with (
            exclusive_lock(path),
            pytest.raises(LockedError, match=f"process {os.getpid()} on"),
            exclusive_lock(path),
        ):
            pass
    assert errno.errorcode[getattr(errno, name)] in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


def test_contention_is_not_a_disk_without_locks(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.EWOULDBLOCK)
    with pytest.raises(LockedError), exclusive_lock(tmp_path / ".lock"):
        pass
    assert not list(tmp_path.glob(".lock.*"))


def test_one_of_several_processes_takes_over_the_lock_of_a_killed_one(tmp_path):
    path = tmp_path / ".lock"
    killed = hold(path)
    assert killed.stdout.readline() == "won\n"
    killed.kill()
    killed.communicate()
    processes = [hold(path) for _ in range(6)]
    lines = [process.stdout.readline() for process in processes]
    for process in processes:
        process.communicate()
    assert lines.count("won\n") == 1


def test_a_lock_of_another_host_is_stale_without_heartbeat(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.ENOSYS)
    path = tmp_path / ".lock"
    other = tmp_path / ".lock.7"
    other.write_text('{"host": "elsewhere", "pid": 1, "pids": ""}')
    with pytest.raises(LockedError, match="process 1 on elsewhere"), exclusive_lock(path):
        pass
    os.utime(other, (0, 0))
    with exclusive_lock(path):
        assert not other.exists()


@pytest.mark.parametrize("content", ["[]", "{}", "3", "half"])
def test_a_lock_file_that_says_nothing_is_held_until_it_is_stale(tmp_path, monkeypatch, content):
    without_flock(monkeypatch, errno.ENOSYS)
    (tmp_path / ".lock.1").write_text(content)
    with pytest.raises(LockedError, match="another process"), exclusive_lock(tmp_path / ".lock"):
        pass
    os.utime(tmp_path / ".lock.1", (0, 0))
    with exclusive_lock(tmp_path / ".lock"):
        pass
