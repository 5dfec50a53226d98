import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    check_resume,
    flatten,
    locked_workdir,
)

STATE = {
    "params": {"encoder": {"w": jnp.arange(6.0).reshape(2, 3)}, "bias": jnp.ones(3)},
    "opt_state": ({"mu": jnp.full(3, 2.0)}, ()),
    "step": jnp.int32(7),
    "ema": None,
}
META = {"config": {"seed": 0}, "data_fingerprint": "abc"}


def shapes_of(state):
    shapes = jax.eval_shape(lambda: state)
    return shapes, jax.tree.map(
        lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes
    )


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "checkpoints", max_to_keep=2)
    yield checkpointer
    checkpointer.close()


def saved(checkpointer, state, *steps):
    for step in steps:
        checkpointer.save(step, state, META)
        checkpointer.wait()


def test_round_trip_is_exact(checkpointer):
    assert checkpointer.latest_step() is None
    saved(checkpointer, STATE, 7)
    assert checkpointer.latest_step() == 7
    assert checkpointer.meta(7) == META
    restored = checkpointer.restore(7, *shapes_of(STATE))
    assert restored["ema"] is None
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)


def test_only_the_newest_are_kept_and_saving_twice_is_harmless(checkpointer):
    saved(checkpointer, STATE, 1, 2, 3, 3)
    folders = sorted(path.name for path in checkpointer.directory.iterdir())
    assert folders == ["2", "3"]


def test_donated_buffers_do_not_reach_a_save_in_the_background(tmp_path):
    """The next step overwrites the state while the last save is still being written."""
    checkpointer = Checkpointer(tmp_path, max_to_keep=2)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"params": {"w": jnp.zeros(2**20)}, "step": jnp.int32(0)}
    checkpointer.save(1, state, META)
    w = state["params"]["w"]
    for _ in range(20):
        w = add(w)
    w.block_until_ready()
    checkpointer.wait()
    shapes = jax.eval_shape(lambda: {"params": {"w": jnp.zeros(2**20)}, "step": jnp.int32(0)})
    restored = checkpointer.restore(1, *shapes_of(shapes))
    assert not np.asarray(restored["params"]["w"]).any()
    checkpointer.close()


def test_what_does_not_fit_is_named(checkpointer):
    saved(checkpointer, STATE, 7)
    params = {"encoder": {"w": jnp.zeros((2, 5))}, "extra": jnp.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore(7, *shapes_of(STATE | {"params": params}))
    message = str(error.value)
    assert "! encoder/w has shape (2, 3), the model needs (2, 5)" in message
    assert "- extra (1,) is missing" in message
    assert "+ bias (3,) is not part of the model" in message
    assert str(checkpointer.directory / "7") in message


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": None}) == {"a.b": 1, "a.c.d": 2, "e": None}


class TestCheckResume:
    OLD = {"seed": 0, "model.width": 32, "mesh.fsdp": 1, "data.path": None}

    def check(self, allow=(), **changes):
        new = self.OLD | {key.replace("__", "."): value for key, value in changes.items()}
        check_resume(self.OLD, new, ["mesh.", "data.path"], allow)

    def test_free_keys_may_change(self, caplog):
        caplog.set_level("INFO")
        self.check(mesh__fsdp=4, data__path="/new")
        assert "mesh.fsdp: 1 -> 4" in caplog.text

    def test_others_are_refused_by_name(self):
        with pytest.raises(CheckpointError) as error:
            self.check(seed=1, model__width=64, mesh__fsdp=2)
        assert "seed: 0 -> 1" in str(error.value)
        assert "resume.allow=model.width,seed" in str(error.value)

    def test_unless_allowed_by_name(self):
        self.check(seed=1, allow=["seed"])
        with pytest.raises(CheckpointError, match="model.width"):
            self.check(seed=1, model__width=64, allow=["seed"])


def test_a_workdir_in_use_is_refused_with_the_owner(tmp_path):
    code = (
        "import sys, pathlib; from mae_jax.checkpoint import *\n"
        "try:\n"
        "  with locked_workdir(pathlib.Path(sys.argv[1])): print('free')\n"
        "except CheckpointError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with locked_workdir(tmp_path):
        import os

        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"in use by process {os.getpid()} on" in out
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "free\n"


@pytest.mark.parametrize("place", ["/proc/mae_jax/run", "file/run"])
def test_a_workdir_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to the workdir"):
        locked_workdir(tmp_path / place).__enter__()
