import shutil
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.distributed.checkpointer import Checkpointer, CheckpointError

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


def restore(checkpointer, state=STATE):
    return checkpointer.restore_latest(*shapes_of(state), lambda meta: None)


def test_round_trip_is_exact(checkpointer):
    assert restore(checkpointer) is None
    saved(checkpointer, STATE, 7)
    metas = []
    step, restored = checkpointer.restore_latest(*shapes_of(STATE), metas.append)
    assert step == 7
    assert META.items() <= metas[0].items()
    assert restored["ema"] is None
    jax.tree.map(np.testing.assert_array_equal, restored, STATE)


def test_only_the_newest_are_kept_and_saving_twice_is_harmless(checkpointer):
    saved(checkpointer, STATE, 1, 2, 3, 3)
    folders = sorted(path.name for path in checkpointer.directory.iterdir())
    assert folders == ["2", "3"]


def test_donated_buffers_do_not_reach_a_save_in_the_background(checkpointer):
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


def test_what_does_not_fit_is_named(checkpointer):
    saved(checkpointer, STATE, 7)
    params = {"encoder": {"w": jnp.zeros((2, 5))}, "extra": jnp.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        restore(checkpointer, STATE | {"params": params})
    message = str(error.value)
    assert "! encoder/w has shape (2, 3), the model needs (2, 5)" in message
    assert "- extra (1,) is missing" in message
    assert "+ bias (3,) is not part of the model" in message
    assert str(checkpointer.directory / "7") in message
    assert (checkpointer.directory / "7").exists(), "nothing is wrong with it"


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(folder):
    """In the parameters themselves: orbax alone would not notice."""
    for file in sorted((folder / "params").rglob("d/*")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def test_no_flipped_byte_is_restored(tmp_path):
    """Most of them orbax would restore in silence."""
    with closing(Checkpointer(tmp_path / "good", max_to_keep=3)) as writer:
        saved(writer, STATE, 1)
    rng = np.random.default_rng(0)
    restored, refused = 0, 0
    for number in range(12):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        file = rng.choice(sorted(map(str, (folder / "1").rglob("d/*"))))
        data = bytearray(Path(file).read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        Path(file).write_bytes(data)
        with closing(Checkpointer(folder, max_to_keep=3)) as reader:
            try:
                _, found = restore(reader)
            except CheckpointError:
                refused += 1
            else:  # it was in a byte that means nothing
                restored += 1
                jax.tree.map(np.testing.assert_array_equal, found, STATE)
    assert (restored + refused, refused > 0) == (12, True)


def truncate(folder):
    file = largest_file(folder / "params")
    file.write_bytes(file.read_bytes()[:10])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def lose_meta(folder):
    shutil.rmtree(folder / "meta")


def lose_train(folder):
    shutil.rmtree(folder / "train")


DAMAGES = [flip_a_byte, truncate, empty, lose_meta, lose_train]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_step_is_set_aside_for_the_one_before(tmp_path, caplog, damage):
    with closing(Checkpointer(tmp_path, max_to_keep=3)) as writer:
        saved(writer, STATE, 1, 2)
    damage(tmp_path / "2")
    with closing(Checkpointer(tmp_path, max_to_keep=3)) as reader:
        step, restored = restore(reader)
        assert step == 1
        jax.tree.map(np.testing.assert_array_equal, restored, STATE)
        assert f"checkpoint {tmp_path / '2'} is damaged and renamed to 2.damaged" in caplog.text
        saved(reader, STATE, 2)  # the name is free again, and a save under it is not dropped
        assert restore(reader)[0] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged"}


def test_never_starts_anew_where_every_step_is_damaged(tmp_path):
    """Nor when it is asked again, after they have been renamed."""
    with closing(Checkpointer(tmp_path, max_to_keep=3)) as writer:
        saved(writer, STATE, 1)
    empty(tmp_path / "1")
    for _ in range(2):
        with (
            closing(Checkpointer(tmp_path, max_to_keep=3)) as reader,
            pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"),
        ):
            restore(reader)


@pytest.mark.parametrize(
    "error",
    [MemoryError("4 GB"), OSError(5, "Input/output error"), ValueError("RESOURCE_EXHAUSTED")],
)
def test_what_may_be_over_the_next_time_is_no_damage(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    with closing(Checkpointer(tmp_path, max_to_keep=3)) as checkpointer:
        saved(checkpointer, STATE, 1)
        with monkeypatch.context() as patch:
            patch.setattr("mae_jax.distributed.checkpointer.read_meta", fail)
            with pytest.raises(CheckpointError, match="cannot be read now"):
                restore(checkpointer)
        assert restore(checkpointer)[0] == 1
