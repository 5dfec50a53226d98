"""Caches and commands with and without a home directory."""

import logging
import os
import subprocess
import sys

import pytest
from run_helpers import ROOT, environment, write_tiny

from mae_jax.data import tfds
from mae_jax.utils import caches
from mae_jax.utils.errors import UserError


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, of a user who has no home directory."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(caches.tempfile, "gettempdir", lambda: str(folder))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    caches._temporary_caches.cache_clear()
    yield folder
    caches._temporary_caches.cache_clear()


def test_caches_lie_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert caches.cache_folder("x") == tmp_path / ".cache" / "mae_jax" / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert caches.cache_folder("x") == tmp_path / "c" / "mae_jax" / "x"
    assert (tmp_path / "c" / "mae_jax" / "x").is_dir()


def test_without_a_home_directory_caches_lie_in_a_private_temporary_folder(temporary, caplog):
    private = temporary / f"mae_jax-{os.getuid()}"
    with caplog.at_level(logging.INFO, "mae_jax.run"):
        assert caches.cache_folder("x") == private / "x"
        assert caches.cache_folder("y") == private / "y"
    assert private.stat().st_mode & 0o777 == 0o700
    assert caplog.messages == [f"there is no writable home directory: caches go to {private}"]
    assert tfds._default_data_dir() == str(private / "tensorflow_datasets")


@pytest.mark.parametrize("home", ["file", "gs://b/x", "relative"])
def test_a_home_that_cannot_be_used_is_not(temporary, tmp_path, monkeypatch, home):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / home) if home == "file" else home)
    assert caches.cache_folder("x") == temporary / f"mae_jax-{os.getuid()}" / "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "temporary"]


def test_a_temporary_folder_that_others_can_write_is_not_used(temporary):
    """Cached programs run: somebody else may have put them there."""
    folder = temporary / f"mae_jax-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert caches.cache_folder("x") is None
    folder.rmdir()
    (temporary / "other").mkdir()
    folder.symlink_to(temporary / "other")
    caches._temporary_caches.cache_clear()
    assert caches.cache_folder("x") is None


def test_the_variable_of_tfds_is_a_path_like_all_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("TFDS_DATA_DIR", "~/datasets")
    assert tfds._default_data_dir() == "/home/x/datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://b/x")
    with pytest.raises(UserError, match="gs:// is not supported"):
        tfds._default_data_dir()


CONTAINER = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]


def _unshares() -> bool:
    try:
        return not subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode
    except OSError:
        return False


@pytest.mark.skipif(not _unshares(), reason="needs user namespaces")
def test_commands_run_as_a_user_without_home_and_passwd_entry(tmp_path):
    """As in a container with a random uid; each says once where its caches go."""
    variables = environment() | {"TMPDIR": str(tmp_path / "temporary")}
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        variables.pop(name, None)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "images").mkdir()
    config = write_tiny(tmp_path / "images")
    flags = ["--config.steps=1", "--config.eval.pictures_every_epochs=-1"]
    flags += ["--config.eval.knn_every_epochs=-1", "--config.optim.warmup_steps=0"]
    for command in (
        [f"{ROOT}/train.py", f"--config={config}", "--workdir=run", *flags],
        ["-m", "mae_jax.data", "cache", f"{tmp_path}/images/train", "copy"],
    ):
        done = subprocess.run(
            [*CONTAINER, sys.executable, *command],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("there is no writable home directory") == 1
    assert (tmp_path / "temporary" / "mae_jax-12345").is_dir()
    assert not (tmp_path / "~").exists()
