"""Checkpoints: round trips, verification, quarantine of corrupt steps, and transient errors."""

import shutil
from contextlib import closing, nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.distributed import checkpointer as checkpointer_module
from mae_jax.distributed.checkpoint_reader import (
    CorruptCheckpointError,
    load_run_checkpoint,
    verify_step,
)
from mae_jax.distributed.checkpointer import Checkpointer, CheckpointError, CheckpointSaveError
from mae_jax.distributed.glob_safe import glob_safe, name_folders
from mae_jax.utils.errors import UserError

STATE = {
    "params": {"encoder": {"w": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3)},
    "opt_state": ({"mu": jnp.full(3, 2.0)}, ()),
    "step": jnp.int32(7),
    "ema": None,
}
META = {"config": {"seed": 0}, "data_fingerprint": "abc"}


def shapes_and_shardings(state):
    shapes = jax.eval_shape(lambda: state)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shapes, jax.tree.map(lambda _: sharding, shapes)


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", max_to_keep=2)
    yield checkpointer
    checkpointer.close()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, to copy."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with closing(Checkpointer(folder, max_to_keep=3)) as writer:
        save(writer, STATE, 1, 2)
    return folder


def save(checkpointer, state, *steps):
    for step in steps:
        checkpointer.save(step, state, META)
        checkpointer.wait()


def test_nothing_is_saved_where_a_deleted_folder_was(checkpointer):
    save(checkpointer, STATE, 1)
    shutil.rmtree(checkpointer.directory)
    with pytest.raises(CheckpointSaveError, match="was deleted, moved or unmounted"):
        save(checkpointer, STATE, 2)
    assert not checkpointer.directory.exists()


def restore(checkpointer, state=STATE):
    return checkpointer.restore_latest(*shapes_and_shardings(state), lambda meta: None)


def assert_equal(restored):
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)


def test_round_trip_is_exact(checkpointer):
    assert restore(checkpointer) is None
    save(checkpointer, STATE, 7)
    metas = []
    step, restored = checkpointer.restore_latest(*shapes_and_shardings(STATE), metas.append)
    assert step == 7
    assert META.items() <= metas[0].items()
    assert restored["ema"] is None
    assert_equal(restored)


def test_old_steps_are_removed_and_saving_a_step_twice_does_nothing(checkpointer):
    save(checkpointer, STATE, 1, 2, 3, 3)
    folders = sorted(path.name for path in checkpointer.directory.iterdir())
    assert folders == ["2", "3"]


def test_donated_buffers_do_not_change_an_asynchronous_save(checkpointer):
    """The next steps overwrite the state while the last save is still being written."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    w = jnp.zeros(2**20)
    checkpointer.save(1, {"params": {"w": w}, "step": jnp.int32(0)}, META)
    for _ in range(20):
        w = add(w)
    w.block_until_ready()
    checkpointer.wait()
    _, restored = restore(checkpointer, {"params": {"w": w}, "step": jnp.int32(0)})
    assert not np.asarray(restored["params"]["w"]).any()


def test_mismatched_shapes_are_listed(checkpointer):
    save(checkpointer, STATE, 7)
    params = {"encoder": {"w": jnp.zeros((2, 5))}, "extra": jnp.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        restore(checkpointer, STATE | {"params": params})
    message = str(error.value)
    assert "! encoder/w has shape (2, 3), the model needs (2, 5)" in message
    assert "- extra (1,) is missing" in message
    assert "+ bias (3,) is not part of the model" in message
    assert str(checkpointer.directory / "7") in message
    assert (checkpointer.directory / "7").exists(), "it is not corrupt"


def test_flipped_bits_are_never_restored(two_steps, tmp_path):
    """Orbax alone would restore most of them without an error."""
    rng = np.random.default_rng(0)
    restored = detected = 0
    for number in range(12):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps / "1", folder / "1")
        files = sorted(path for path in (folder / "1").rglob("d/*"))
        file = files[rng.integers(len(files))]
        data = bytearray(file.read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        with closing(Checkpointer(folder, max_to_keep=3)) as reader:
            try:
                _, state = restore(reader)
            except CheckpointError:
                detected += 1
            else:  # a byte without meaning
                restored += 1
                assert_equal(state)
    assert restored + detected == 12
    assert detected > 0


def flip_a_bit(folder):
    """In the arrays, where orbax alone would not notice."""
    for file in sorted((folder / "params").rglob("d/*")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def truncate(folder):
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:10])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def remove_meta(folder):
    shutil.rmtree(folder / "meta")


def remove_train(folder):
    shutil.rmtree(folder / "train")


CORRUPTIONS = [flip_a_bit, truncate, empty, remove_meta, remove_train]


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda f: f.__name__)
def test_corrupt_steps_are_quarantined_and_the_previous_is_restored(
    two_steps, tmp_path, caplog, corrupt
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    corrupt(folder / "2")
    if corrupt in (flip_a_bit, remove_meta):  # as the other commands read it, without changes
        step, (params,), meta = load_run_checkpoint(folder)
        assert (step, meta["data_fingerprint"]) == (1, "abc")
        np.testing.assert_array_equal(params["encoder"]["w"], STATE["params"]["encoder"]["w"])
        with pytest.raises(CheckpointError, match="has no readable step 2; its steps are"):
            load_run_checkpoint(folder, 2)
    with closing(Checkpointer(folder, max_to_keep=3)) as reader:
        step, restored = restore(reader)
        assert step == 1
        assert_equal(restored)
        assert f"checkpoint {folder / '2'} is damaged and renamed to 2.damaged" in caplog.text
        save(reader, STATE, 2)  # its name is free
        assert restore(reader)[0] == 2
    assert {path.name for path in folder.iterdir()} == {"1", "2", "2.damaged"}


def test_if_every_step_is_corrupt_the_run_does_not_start_over(two_steps, tmp_path):
    shutil.copytree(two_steps / "1", tmp_path / "1")
    empty(tmp_path / "1")
    for _ in range(2):  # also if the step has been renamed before
        with (
            closing(Checkpointer(tmp_path, max_to_keep=3)) as reader,
            pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"),
        ):
            restore(reader)


@pytest.mark.parametrize(
    "error",
    [MemoryError("4 GB"), OSError(5, "Input/output error"), ValueError("RESOURCE_EXHAUSTED")],
    ids=repr,
)
def test_transient_errors_are_not_corruption(two_steps, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    shutil.copytree(two_steps / "1", tmp_path / "1")
    with closing(Checkpointer(tmp_path, max_to_keep=3)) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("mae_jax.distributed.checkpointer.read_meta", fail)
            with pytest.raises(CheckpointError, match="cannot be read now"):
                restore(checkpointer)
        assert restore(checkpointer)[0] == 1


@pytest.mark.parametrize("name", ["lr[1e-4]", "a[b", "q?*", "[x]/[y]/run", "gs:/run"])
def test_folders_may_have_characters_that_libraries_expand(tmp_path, name):
    folder, renamed = tmp_path / name / "checkpoints", tmp_path / "renamed"
    for step in (1, 2):
        with closing(Checkpointer(folder, max_to_keep=2)) as writer:
            save(writer, STATE, step)
    with closing(Checkpointer(folder, max_to_keep=2)) as reader:
        step, restored = restore(reader)
    assert step == 2
    assert_equal(restored)
    folder.rename(renamed)
    _, (params,), _ = load_run_checkpoint(renamed)
    np.testing.assert_array_equal(params["bias"], STATE["params"]["bias"])


def test_such_a_folder_is_refused_where_it_has_no_other_name(tmp_path, monkeypatch):
    monkeypatch.setattr("mae_jax.distributed.glob_safe._DESCRIPTORS", tmp_path / "none")
    with pytest.raises(UserError, match=r"x\[1\]: choose a path without the characters"):
        Checkpointer(tmp_path / "x[1]", max_to_keep=2)
    assert not list(tmp_path.iterdir())


def test_messages_have_the_name_of_such_a_folder(tmp_path):
    folder = tmp_path / "x[1]"
    with glob_safe(folder) as path:
        assert name_folders(f"cannot read {path}/7") == f"cannot read {folder}/7"


def test_the_first_save_is_read_back_before_older_steps_are_removed(
    two_steps, tmp_path, monkeypatch
):
    """Without the other name of such a folder, orbax writes what nobody can read."""
    folder = tmp_path / "x[1]"
    shutil.copytree(two_steps, folder)
    monkeypatch.setattr(checkpointer_module, "glob_safe", lambda path: nullcontext(path.absolute()))
    writer = Checkpointer(folder, max_to_keep=1)
    with pytest.raises(CheckpointSaveError, match=r"step 3 was written .* cannot be read back"):
        writer.save(3, STATE, META)
    assert {"1", "2"} <= {path.name for path in folder.iterdir()}
    writer.close()


def test_older_steps_are_removed_once_the_first_save_is_read_back(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    with closing(Checkpointer(tmp_path / "copy", max_to_keep=1)) as writer:
        writer.save(3, STATE, META)
        assert [path.name for path in (tmp_path / "copy").iterdir()] == ["3"]


def test_reading_back_finds_a_flipped_bit(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "copy")
    verify_step(tmp_path / "copy", 1, STATE)
    flip_a_bit(tmp_path / "copy" / "1")
    with pytest.raises(CorruptCheckpointError):
        verify_step(tmp_path / "copy", 1, STATE)
