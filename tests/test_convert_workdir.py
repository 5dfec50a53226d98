"""The checkpoints of training runs, read from their workdirs."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import assert_same

import mae_jax
from mae_jax.convert import weights
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two checkpoints of a tiny model, its objective, and the last parameters."""
    workdir = tmp_path_factory.mktemp("run")
    model = dict(image_size=(16, 24), channels=3, patch=8, width=16, depth=2, heads=2)
    model |= dict(decoder_width=16, decoder_depth=1, decoder_heads=4, mlp_ratio=2.0)
    model |= dict(layer_norm_eps=1e-5, position="sincos")
    mae = make_mae(
        VitVariant(16, 2, 2, 8, 16, 1, 4, mlp_ratio=2.0), grid=(2, 3), layer_norm_eps=1e-5
    )
    task = Pretrain(
        model=mae, grid=(2, 3), patch=8, mean=(0.5,) * 3, std=(0.25,) * 3, mask_ratio=0.5
    )
    data = dict(mean=(0.5,) * 3, std=(0.25,) * 3, eval_crop=1.0)
    target = dict(norm_pix=True, norm_pix_eps=1e-2)
    config = {"task": "pretrain", "model": model, "data": data, "target": target}
    config |= {"mask": {"kind": "random", "ratio": 0.5}}
    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=3)
    params = jax.tree.map(np.asarray, jax.jit(task.init)(jax.random.key(0)))
    for step in (5, 10):
        params = jax.tree.map(lambda x: x + np.float32(0.01), params)
        ema = jax.tree.map(lambda x: x / 2, params)
        state = {"params": params, "ema": ema, "step": jnp.int32(step), "opt_state": ()}
        checkpointer.save(step, state, {"config": config, "data_fingerprint": ""})
    checkpointer.close()
    return workdir, task, params


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)


def test_workdir_or_any_of_its_folders(run, images):
    workdir, task, params = run
    latest = weights.read(workdir)
    for path in (workdir / "checkpoints", workdir / "checkpoints" / "10"):
        assert_same(weights.read(path).arrays, latest.arrays)
    model, loaded = mae_jax.load(workdir)
    expected = jax.jit(task.features)(params, jnp.asarray(images))
    np.testing.assert_allclose(model.features(loaded, images)["mean"], expected, atol=1e-5)
    info = model.info
    assert (info.source, info.target, info.norm_pix_eps) == ("mae_jax", "normalized", 1e-2)
    assert (info.image_size, info.crop, info.layer_norm_eps) == ((16, 24), 1.0, 1e-5)
    assert info.mean == (0.5,) * 3
    cls_token = params["encoder"]["cls_token"]
    ema = weights.read(workdir, ema=True).arrays["encoder/cls_token"]
    np.testing.assert_array_equal(ema, cls_token / 2)
    older = weights.read(workdir / "checkpoints" / "5").arrays["encoder/cls_token"]
    assert (older != cls_token).any()


def test_reconstruction_is_that_of_training(run, images):
    workdir, task, params = run
    mask = task.sample_mask(jax.random.key(3), 2)
    model, loaded = mae_jax.load(workdir)
    reconstruction = model.reconstruct(loaded, images, seed=3)
    expected = jax.jit(task.reconstruct, static_argnums=3)(params, images, mask, "visible")
    assert np.abs(np.int32(reconstruction) - np.int32(expected)).max() <= 1  # rounding


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_workdir_to_huggingface_and_timm(run, tmp_path, caplog):
    workdir, _, _ = run
    before = weights.resize_pos_embed(weights.read(workdir), (16, 16))
    weights.write(before, tmp_path / "hf", "hf")
    after = weights.read(tmp_path / "hf")
    assert_same(after.arrays, before.arrays)
    assert after.info == before.info
    assert after.info.mask_ratio == 0.5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["mask_ratio"] == 0.5
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(workdir), tmp_path / "timm", "timm")
    assert "layer_norm_eps=1e-05, which timm cannot store" in caplog.text
    assert "timm has no decoder" in caplog.text
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3


def test_corrupt_step_falls_back_to_the_previous_one(run, tmp_path, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(run[0], workdir)
    for file in (workdir / "checkpoints" / "10" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-100] + b"x" * 100)
    with caplog.at_level(logging.WARNING):
        arrays = weights.read(workdir).arrays
    assert "corrupt" in caplog.text
    assert_same(arrays, weights.read(run[0] / "checkpoints" / "5").arrays)
    assert (workdir / "checkpoints" / "10").is_dir()  # reading changes nothing
