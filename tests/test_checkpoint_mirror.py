"""Checkpoints in an object store: a run goes on elsewhere, and others read them."""

import logging

import jax
import numpy as np
import pytest
from convert_helpers import assert_same
from store_helpers import BUCKET, SECRET, serving, upload_folder
from test_checkpoint import STATE, save, shapes_and_shardings

from mae_jax.convert import weights
from mae_jax.convert.locate import locate
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.workdir import find_checkpoints
from mae_jax.distributed.checkpoint_mirror import CheckpointMirror, list_steps
from mae_jax.distributed.checkpoint_reader import load_run_checkpoint
from mae_jax.distributed.checkpointer import Checkpointer, CheckpointSaveError
from mae_jax.train import recipes
from mae_jax.train.config import from_config_dict
from mae_jax.utils import remote
from mae_jax.utils.errors import UserError
from mae_jax.utils.remote import ATTEMPTS, RemotePath


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def address(server, request):
    yield RemotePath(f"{BUCKET}/{request.node.name}")
    server.fail()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checkpointer(address, workdir, max_to_keep=2):
    workdir.mkdir(exist_ok=True)
    mirror = CheckpointMirror(address, workdir, max_to_keep, ("init.json",))
    return Checkpointer(workdir / "checkpoints", max_to_keep, mirror)


def restored(address, workdir):
    """Return the step that another machine restores, and its state."""
    with checkpointer(address, workdir) as reader:
        return reader.restore_latest(*shapes_and_shardings(STATE), lambda meta: None)


def test_another_machine_restores_the_latest_step(address, server, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "init.json").write_text("{}")
    server.fail(503, 500, methods=("PUT", "GET"))
    with checkpointer(address, tmp_path / "a") as writer:
        save(writer, STATE, 2, 3)
    assert list_steps(address / "checkpoints") == [2, 3]
    step, state = restored(address, tmp_path / "b")
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, dict(state), STATE)
    assert (tmp_path / "b" / "init.json").exists()
    (tmp_path / "b" / "init.json").write_text("mine")
    server.requests.clear()
    assert restored(address, tmp_path / "b")[0] == 3
    assert not any(method == "GET" and "/3/params" in path for method, path, _ in server.requests)
    assert not any(method == "PUT" and "/3/" in path for method, path, _ in server.requests)
    assert (tmp_path / "b" / "init.json").read_text() == "mine"


@pytest.fixture(scope="module")
def two_steps(server, tmp_path_factory):
    """The address of a mirror with the steps 1 and 2."""
    address = RemotePath(f"{BUCKET}/two_steps")
    with checkpointer(address, tmp_path_factory.mktemp("run")) as writer:
        save(writer, STATE, 1, 2)
    return address


def write_step(workdir, step):
    """Write a folder that is copied as a checkpoint is."""
    folder = workdir / "checkpoints" / str(step)
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "a").write_text(f"of step {step}")
    (folder / "metadata").write_text("x")


def copy_steps(address, workdir, *steps):
    mirror = CheckpointMirror(address, workdir, 2)
    for step in steps:
        write_step(workdir, step)
        mirror.start(step)
        mirror.wait()
    mirror.close()


def fetched(address, workdir):
    """Return the steps of a workdir after a download, which are complete."""
    CheckpointMirror(address, workdir, 2).fetch()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("*"))
    for step in steps:
        assert (workdir / "checkpoints" / f"{step}/params/a").read_text() == f"of step {step}"
    return steps


def test_an_interrupted_upload_is_no_checkpoint(address, tmp_path):
    copy_steps(address, tmp_path / "a", 1)
    step = address / "checkpoints" / "2"
    (step / "params" / "left").write_text("by an upload that was killed")
    assert list_steps(address / "checkpoints") == [1]
    assert fetched(address, tmp_path / "b") == [1]
    copy_steps(address, tmp_path / "b", 2)
    assert not (step / "params" / "left").exists()
    assert fetched(address, tmp_path / "c") == [2]
    # A removal that was interrupted, too; what no run repeats is removed by the next upload.
    (address / "checkpoints" / "1" / "manifest.json").remove()
    assert list_steps(address / "checkpoints") == [2]
    copy_steps(address, tmp_path / "c", 3, 4)
    assert [path.name for path in (address / "checkpoints").iterdir()] == ["3", "4"]
    assert fetched(address, tmp_path / "a") == [1, 4]


def test_a_store_that_fails_does_not_stop_training_but_its_end_is_an_error(
    address, server, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    writer = checkpointer(address, tmp_path / "a")
    save(writer, STATE, 1)
    writer._mirror.wait()
    server.fail(*[503] * 1000, methods=("PUT", "POST"))
    save(writer, STATE, 2, 3)
    assert f"the checkpoint of step 2 is not in {address}" in caplog.text
    assert "Training goes on" in caplog.text
    with pytest.raises(CheckpointSaveError, match=r"step 3 is not in s3://.*after 2 attempts") as e:
        writer.close()
    assert SECRET not in caplog.text + str(e.value)
    server.fail()
    assert list_steps(address / "checkpoints") == [1]
    # The same command copies what is missing.
    assert restored(address, tmp_path / "a")[0] == 3
    assert list_steps(address / "checkpoints") == [1, 3]


def test_a_mirror_that_cannot_be_used_is_found_at_the_start(address, server, tmp_path):
    server.fail(403, methods=("PUT",))
    with pytest.raises(UserError, match=r"cannot write s3://.*/.writable: Forbidden.* credentials"):
        checkpointer(address, tmp_path / "a")
    with pytest.raises(UserError, match="^s3://nobody/x: there is no such bucket"):
        checkpointer(RemotePath("s3://nobody/x"), tmp_path / "a")
    config = recipes.base()
    for text, problem in (("runs/x", "'runs/x' is no address"), ("az://b/x", " az://b/x is no")):
        config.checkpoint.mirror = text
        with pytest.raises(UserError, match=f"^checkpoint.mirror.{problem}"):
            from_config_dict(config)


def test_files_that_changed_in_the_mirror_are_not_used(address, tmp_path):
    copy_steps(address, tmp_path / "a", 1)
    step = address / "checkpoints" / "1"
    text = (step / "manifest.json").read_text()
    (step / "metadata").write_text("cut off")
    with pytest.raises(UserError, match="1/metadata has not the 1 bytes that were uploaded: rem"):
        fetched(address, tmp_path / "b")
    (step / "metadata").remove()
    with pytest.raises(UserError, match="1/metadata is missing: .* is incomplete"):
        fetched(address, tmp_path / "b")
    (step / "manifest.json").write_text(text.replace("metadata", "../../x"))
    with pytest.raises(UserError, match=r"an object '../../x', which is no file in a folder"):
        fetched(address, tmp_path / "b")
    assert not any((tmp_path / "b" / "checkpoints").iterdir())


def test_a_corrupt_step_of_a_mirror_is_left_out(address, tmp_path, caplog):
    with checkpointer(address, tmp_path / "a") as writer:
        save(writer, STATE, 1, 2)
    step = address / "checkpoints" / "2"
    for path in step.walk():
        if "/params/" in path.address:
            path.write_text("x" * path.stat().st_size)
    with checkpointer(address, tmp_path / "b") as run:
        assert run.restore_latest(*shapes_and_shardings(STATE), lambda meta: None)[0] == 1
        assert "is damaged and renamed to 2.damaged" in caplog.text
        save(run, STATE, 2)
    assert restored(address, tmp_path / "c")[0] == 2


def test_a_mirror_of_another_run_is_left_alone(address, tmp_path):
    def refuse(meta):
        raise UserError(f"of the seed {meta['config']['seed']}")

    with checkpointer(address, tmp_path / "a") as writer:
        save(writer, STATE, 2)
    for step in (1, 3):
        workdir = tmp_path / str(step)
        write_step(workdir, step)
        mirror = CheckpointMirror(address, workdir, 2, validate_meta=refuse)
        with pytest.raises(UserError, match="^of the seed 0"):
            mirror.fetch()
        assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(step)]
        mirror.start(step)
        with pytest.raises(UserError, match="^of the seed 0"):
            mirror.wait()
    assert list_steps(address / "checkpoints") == [2]


def test_a_mirror_is_a_checkpoint(two_steps, server, cache):
    for name, step in (("/checkpoints/1", 1), ("/checkpoints/2", 2), ("/checkpoints/", 2), ("", 2)):
        path = locate(f"{two_steps}{name}").path
        folder, _ = find_checkpoints(path)
        assert [child.name for child in folder.iterdir()] == [str(step)]
    read, [params], _ = load_run_checkpoint(folder)
    assert read == 2
    jax.tree.map(np.testing.assert_array_equal, params, STATE["params"])
    server.requests.clear()
    assert locate(str(two_steps)).path == path
    gets = [path for method, path, _ in server.requests if method == "GET"]
    assert not any("/params/" in path for path in gets), "it is in the cache"


def test_weights_files_and_directories_are_read_from_a_store(golden, address, server, cache):
    folder = golden / "hf" / "hf_tiny" / "pretrained_v5"
    upload_folder(folder, f"{address}/model")
    expected = weights.read(folder, require_num_heads=())
    assert_same(weights.read(f"{address}/model", require_num_heads=()).arrays, expected.arrays)
    path = locate(f"{address}/model/model.safetensors").path
    assert path.read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ConvertError, match=f"^{address}/no does not exist$"):
        locate(f"{address}/no")
    server.fail(*[500] * ATTEMPTS, where="config.json")
    (address / "model" / "config.json").write_text("{}")
    with pytest.raises(OSError, match=r"config.json, after 8 attempts"):
        locate(f"{address}/model")
