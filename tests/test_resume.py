"""Resuming: which config changes are allowed, and that runs of earlier versions continue."""

import json
import tarfile

import numpy as np
import pytest
from run_helpers import final_arrays, losses, run

from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.train.resume import check_compatible

OLD = {"seed": 0, "steps": 9, "model": {"width": 32}, "mesh": {"fsdp": 1}, "data": {"path": None}}


def check(allow=(), **changes):
    new = json.loads(json.dumps(OLD))
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (new.setdefault(group, {}) if group else new)[name] = value
    metas = ({"config": config, "data_fingerprint": "same"} for config in (OLD, new))
    check_compatible(*metas, allow)


def test_resumable_keys_may_change(caplog):
    caplog.set_level("INFO")
    check(mesh__fsdp=4, data__path="/new")
    assert "mesh.fsdp: 1 -> 4" in caplog.text


def test_other_keys_are_an_error():
    with pytest.raises(CheckpointError) as error:
        check(seed=1, steps=8, mesh__fsdp=2)
    assert "seed: 0 -> 1" in str(error.value)
    assert str(error.value).endswith("or resume with --config.resume.allow=seed,steps")


def test_other_shapes_cannot_be_allowed():
    with pytest.raises(CheckpointError) as error:
        check(seed=1, model__width=64)
    assert str(error.value).endswith(
        "Use another --workdir: the checkpoint's arrays have other shapes: model.width"
    )


def test_an_unknown_key_cannot_be_allowed():
    with pytest.raises(CheckpointError, match="resume.allow='sede' is not a config key"):
        check(seed=1, allow=["sede"])


def test_allowed_keys_may_change():
    check(seed=1, allow=["seed"])
    with pytest.raises(CheckpointError, match="model.width"):
        check(seed=1, model__width=64, allow=["seed"])


def test_keys_that_earlier_versions_lack_have_their_implied_value():
    check(decoder__predict_ratio=1.0)
    with pytest.raises(CheckpointError, match=r"decoder.predict_ratio: 1.0 -> 0.5"):
        check(decoder__predict_ratio=0.5)


EARLIER = """
from mae_jax.train import recipes


def get_config():
    config = recipes.base()
    config.batch_size = 4
    config.steps = 12
    config.model.update(image_size=(16, 16), patch=8, width=8, depth=2, heads=2)
    config.model.update(decoder_width=8, decoder_depth=1, decoder_heads=2)
    config.optim.warmup_steps = 2
    config.optim.ema = 0.9
    config.data.update(source="arrays", path={folder!r}, eval_split="train")
    config.eval.update(knn_every_epochs=-1.0, pictures_every_epochs=0.0, pictures=1)
    config.log.every_steps = 1
    config.checkpoint.update(every_steps=6, max_to_keep=1)
    return config
"""


def test_a_run_of_version_0_1_continues(golden, tmp_path):
    """Its workdir stopped at step 6 of 12; losses.json has those of the uninterrupted run."""
    with tarfile.open(golden / "begun_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 20, 20, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", image=images, label=np.arange(8) % 2)
    config = tmp_path / "earlier.py"
    config.write_text(EARLIER.format(folder=str(tmp_path)))

    output = run(config, tmp_path / "begun")
    assert "resuming from step 6" in output
    expected = json.loads((tmp_path / "losses.json").read_text())
    assert {str(step) for step in losses(tmp_path / "begun")} == expected.keys()
    for step, loss in losses(tmp_path / "begun").items():
        assert loss == pytest.approx(expected[str(step)], rel=1e-5)
    assert all(np.isfinite(array).all() for array in final_arrays(tmp_path / "begun", 12))
