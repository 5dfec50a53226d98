"""timm's vision transformers against ours, on the same weights and images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.hf_timm import timm_model_args
from mae_jax.convert.model_info import make_classifier, to_variables
from mae_jax.models.patches import patchify

TIMM = os.environ["TIMM"]  # where `pip install --target` put it; the Makefile knows


def run_timm(tmp_path, name, arguments, weights, images):
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, Path(__file__).parent / "timm_peer.py", TIMM, name]
    command += [json.dumps(arguments), weights, tmp_path / "images.npy", tmp_path / "out.npz"]
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return np.load(tmp_path / "out.npz")


def images_of(size):
    return np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)


def check(expected, path, images, **reading):
    model, params = mae_jax.load(path, **reading)
    patches = patchify(jnp.asarray(images.transpose(0, 2, 3, 1)), model.info.patch)
    outputs = make_classifier(model.info).apply(to_variables(params), patches)
    found = {"tokens": outputs.tokens, "logits": outputs.logits}
    if outputs.logits is None:
        found["logits"] = outputs.pooled  # timm's model without classes gives these
    for name, array in found.items():
        difference = np.abs(np.asarray(array) - expected[name]).max()
        assert difference <= 5e-5 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_ours_to_timm(golden, tmp_path, suffix):
    found = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    path = tmp_path / f"weights{suffix}"
    arguments = timm_model_args(found.info)
    weights.write(found, path, "timm")
    expected = run_timm(tmp_path, "vit_base_patch16_224.mae", arguments, path, images_of(32))
    check(expected, path, images_of(32), heads=2)


def test_fine_tuned_to_timm(golden, tmp_path):
    found = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    arguments = timm_model_args(found.info)
    weights.write(found, tmp_path / "w.safetensors", "timm")
    name = "vit_base_patch16_224"
    expected = run_timm(tmp_path, name, arguments, tmp_path / "w.safetensors", images_of(32))
    check(expected, golden / "vit/v0_gap/state_dict.safetensors", images_of(32), heads=2)


def test_directory_for_timm(golden, tmp_path):
    found = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    weights.write(found, tmp_path / "timm", "timm")
    name = f"local-dir:{tmp_path / 'timm'}"
    expected = run_timm(tmp_path, name, {}, "none", images_of(32))
    check(expected, tmp_path / "timm", images_of(32))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_base_patch16_224.mae", {}),
        ("vit_base_patch16_224", dict(num_classes=10, global_pool="avg")),
    ],
)
def test_vit_b_from_timm(tmp_path, name, arguments):
    expected = run_timm(tmp_path, name, arguments, "random", images_of(224))
    check(expected, tmp_path / "out.pth", images_of(224), dialect="timm")
