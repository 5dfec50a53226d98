"""Atomic writes: what is left behind by errors and killed processes."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from mae_jax.utils.atomic import atomic_path

KILLED = """
import os, signal, sys
from pathlib import Path
from mae_jax.utils.atomic import atomic_path

with atomic_path(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
WRITER = """
import sys
from pathlib import Path
from mae_jax.utils.atomic import write_json

write_json(Path(sys.argv[1]), 2)
"""


def write_model(folder):
    with atomic_path(folder) as part:
        part.mkdir()
        (part / "config.json").write_text("new")
        (part / "model.safetensors").write_text("new weights")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_of_a_killed_process_is_removed_by_the_next_write(tmp_path):
    out = tmp_path / "out.txt"
    out.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, out]).returncode == -9
    assert out.read_text() == "old"
    assert len(names(tmp_path)) == 2
    with atomic_path(out) as part:
        part.write_text("new")
    assert names(tmp_path) == ["out.txt"]
    assert out.read_text() == "new"


def test_the_file_of_a_running_process_is_kept(tmp_path):
    out = tmp_path / "out.txt"
    with atomic_path(out) as first:
        first.write_text("first")
        subprocess.run([sys.executable, "-c", WRITER, out], check=True)
        assert first.read_text() == "first"
        assert out.read_text() == "2\n"
    assert out.read_text() == "first"


def test_an_interrupted_update_of_a_folder_leaves_no_old_weights(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "model.safetensors").write_text("old weights")
    replace = Path.replace

    def fail(source, target):
        if source.name == "model.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_model(folder)
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["config.json"]
