"""NaN/Inf losses and gradients."""

import json

import numpy as np
import pytest
from run_helpers import losses, run

from mae_jax.convert import weights

BAD = 3  # an image with values whose squares float32 cannot hold


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """Arrays of 24 images, one of which overflows."""
    folder = tmp_path_factory.mktemp("flawed")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 16, 24, 3)).astype(np.float32)
    np.savez(folder / "val.npz", image=images)
    images[BAD] = rng.uniform(-3e38, 3e38, images[0].shape)
    np.savez(folder / "train.npz", image=images)
    mean = ["--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(2.0,2.0,2.0)"]
    return ["--config.data.source=arrays", f"--config.data.path={folder}", *mean]


def skipped(workdir):
    return [json.loads(line) for line in (workdir / "skipped.jsonl").read_text().splitlines()]


def test_bad_steps_are_skipped_and_their_images_named(tiny, flawed, tmp_path):
    output = run(tiny, tmp_path, *flawed)
    rows = skipped(tmp_path)
    assert len(rows) == 8, "each epoch of three steps has one"
    for row in rows:
        assert row["loss"] in ("nan", "inf")
        assert len(row["images"]) == 8
        assert any(name.startswith(f"image {BAD} of") for name in row["images"])
        assert f"skipped step {row['step']} " in output
    assert all(np.isfinite(loss) for loss in losses(tmp_path).values())
    assert all(np.isfinite(array).all() for array in weights.read(tmp_path).arrays.values())


def test_too_many_consecutive_bad_steps_abort_with_a_dump(tiny, tmp_path):
    """At this learning rate every loss after the first step is NaN or Inf."""
    flags = ["--config.optim.base_lr=1e30", "--config.optim.warmup_steps=1"]
    flags += ["--config.health.max_bad_steps=4"]
    output = run(tiny, tmp_path, *flags, code=3)
    assert "loss or gradients were NaN/Inf for" in output
    assert "Traceback" not in output
    assert len(skipped(tmp_path)) >= 4
    (dump,) = (path for path in (tmp_path / "halted").iterdir() if path.name.isdecimal())
    dumped = weights.read(tmp_path / "halted")
    assert all(np.isfinite(array).all() for array in dumped.arrays.values()), dump
    assert not any((tmp_path / "checkpoints").iterdir()), "no checkpoint of skipped steps"


def test_rollback_skips_bad_data(tiny, flawed, tmp_path):
    flags = [*flawed, "--config.health.max_bad_steps=1", "--config.checkpoint.every_steps=2"]
    flags += ["--config.steps=12", "--config.log.every_steps=1"]
    output = run(tiny, tmp_path, *flags, "--config.health.rollbacks=40")
    assert "rolling back to step" in output
    assert "After 12 steps" in output
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    assert "skipped_steps" not in (tmp_path / "metrics.jsonl").read_text()
    again = run(tiny, tmp_path / "few", *flags, "--config.health.rollbacks=1", code=3)
    assert again.count("rolling back to step") == 1
