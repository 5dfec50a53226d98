"""A run whose machine is lost goes on from the object store."""

import numpy as np
import pytest
from run_helpers import assert_same_end, losses, run, start, wait_for
from store_helpers import BUCKET, serving

from mae_jax.convert import weights
from mae_jax.distributed.checkpoint_mirror import list_steps
from mae_jax.utils.remote import RemotePath


@pytest.fixture
def server():
    with serving() as server:
        yield server


def test_another_machine_ends_with_the_same_state(tiny, straight, server, tmp_path, monkeypatch):
    """kill -9 as soon as the store has a checkpoint; the workdir of the first machine is gone."""
    mirror = RemotePath(f"{BUCKET}/run")
    flags = [f"--config.checkpoint.mirror={mirror}", "--config.log.every_steps=1"]
    process = start(tiny, tmp_path / "lost", *flags)
    wait_for(process, lambda: list_steps(mirror / "checkpoints"), pause=0.1)
    process.kill()
    process.communicate()
    server.fail(503, 500, 503)
    output = run(tiny, tmp_path / "new", *flags)
    assert "resuming from step" in output
    assert_same_end(tmp_path / "new", straight)
    assert losses(tmp_path / "new") == losses(straight)
    assert list_steps(mirror / "checkpoints") == [15, 20, 24]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    expected = weights.read(straight).arrays
    for name, array in weights.read(str(mirror)).arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    # Without an upload, for which nothing changed; and as a warm start.
    server.requests.clear()
    run(tiny, tmp_path / "new", *flags)
    assert not any(method == "PUT" and "/24/" in path for method, path, _ in server.requests)
    run(tiny, tmp_path / "warm", f"--config.init.path={mirror}", "--config.steps=6")


def test_two_processes_share_a_mirror(tiny, server, tmp_path):
    mirror = RemotePath(f"{BUCKET}/two")
    flags = [f"--config.checkpoint.mirror={mirror}", "--config.log.every_steps=1"]
    run(tiny, tmp_path / "two", *flags, processes=2)
    assert list_steps(mirror / "checkpoints") == [15, 20, 24]
    (mirror / "checkpoints" / "24").remove()
    run(tiny, tmp_path / "again", *flags, processes=2)
    assert losses(tmp_path / "again") == losses(tmp_path / "two")
    ends = [weights.read(tmp_path / name).arrays for name in ("again", "two")]
    for name, array in ends[0].items():
        np.testing.assert_array_equal(array, ends[1][name])
