"""Outputs of timm's vision transformers on the same weights and images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.hf_timm import timm_model_args
from mae_jax.convert.networks import make_classifier, to_variables
from mae_jax.models.image_ops import normalize
from mae_jax.models.patches import patchify

TIMM = os.environ["TIMM"]  # its folder: `pip install --target`, see the Makefile


def run_timm(tmp_path, name, arguments, weights, images):
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, Path(__file__).parent / "timm_peer.py", TIMM, name]
    command += [json.dumps(arguments), weights, tmp_path / "images.npy", tmp_path / "out.npz"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "out.npz")


def random_images(size):
    return np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)


def check(expected, path, images, **overrides):
    model, params = mae_jax.load(path, **overrides)
    patches = patchify(jnp.asarray(images.transpose(0, 2, 3, 1)), model.info.patch)
    outputs = jax.jit(make_classifier(model.info).apply)(to_variables(params), patches)
    arrays = {"tokens": outputs.tokens, "logits": outputs.logits}
    if outputs.logits is None:
        arrays["logits"] = outputs.pooled  # which timm returns without a head
    for name, array in arrays.items():
        difference = np.abs(np.asarray(array) - expected[name]).max()
        assert difference <= 5e-5 * np.abs(expected[name]).max(), name


def test_dense_features_of_every_block_are_those_of_forward_intermediates(golden, tmp_path):
    checkpoint = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    path, (height, width) = tmp_path / "weights.safetensors", checkpoint.info.image_size
    weights.write(checkpoint, path, "timm")
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    pixels = normalize(jnp.asarray(images), *checkpoint.info.stats(np.uint8)).transpose(0, 3, 1, 2)
    arguments = timm_model_args(checkpoint.info)
    expected = run_timm(tmp_path, "vit_base_patch16_224.mae", arguments, path, pixels)
    model, params = mae_jax.load(path, heads=2)
    layers = range(1, checkpoint.info.depth + 1)
    features = model.features(params, images, layers=layers, grid=True)
    for layer in layers:
        grid = np.moveaxis(np.asarray(features[f"grid_{layer}"]), -1, 1)
        np.testing.assert_allclose(grid, expected["grids"][layer - 1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_export_of_an_encoder(golden, tmp_path, suffix):
    checkpoint = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    path = tmp_path / f"weights{suffix}"
    arguments = timm_model_args(checkpoint.info)
    weights.write(checkpoint, path, "timm")
    expected = run_timm(tmp_path, "vit_base_patch16_224.mae", arguments, path, random_images(32))
    check(expected, path, random_images(32), heads=2)


def test_export_of_a_classifier(golden, tmp_path):
    checkpoint = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    arguments = timm_model_args(checkpoint.info)
    weights.write(checkpoint, tmp_path / "w.safetensors", "timm")
    name = "vit_base_patch16_224"
    expected = run_timm(tmp_path, name, arguments, tmp_path / "w.safetensors", random_images(32))
    check(expected, golden / "vit/v0_gap/state_dict.safetensors", random_images(32), heads=2)


def test_export_of_a_directory(golden, tmp_path):
    checkpoint = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    weights.write(checkpoint, tmp_path / "timm", "timm")
    name = f"local-dir:{tmp_path / 'timm'}"
    expected = run_timm(tmp_path, name, {}, "none", random_images(32))
    check(expected, tmp_path / "timm", random_images(32))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_base_patch16_224.mae", {}),
        ("vit_base_patch16_224", dict(num_classes=10, global_pool="avg")),
    ],
)
def test_import_of_vit_b(tmp_path, name, arguments):
    expected = run_timm(tmp_path, name, arguments, "random", random_images(224))
    check(expected, tmp_path / "out.pth", random_images(224), dialect="timm")
