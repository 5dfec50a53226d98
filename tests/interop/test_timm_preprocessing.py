"""Pixel values of timm's evaluation transforms for the same pretrained_cfg."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from PIL import Image

import mae_jax
from mae_jax.convert import weights
from mae_jax.models.image_ops import normalize

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# Rules of ours that timm has, too.
EXPORTS = {
    "crop": dict(resize="crop", crop=0.8),
    "squash": dict(resize="squash", crop=0.9, interpolation="box"),
    "border": dict(resize="border", crop=1.0),
    "shortest edge": dict(
        resize="processor", crop=1.0, size=(("shortest_edge", 73),), crop_size=(64, 64)
    ),
    "squash to 72": dict(
        resize="processor", crop=1.0, size=(("height", 72), ("width", 72)), crop_size=(64, 64)
    ),
}


@pytest.fixture(scope="module")
def checkpoint(golden):
    return weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    coarse.resize((161, 121), Image.Resampling.BICUBIC).save(path)
    return path


def run_timm(picture, folders, out):
    peer = Path(__file__).parent / "timm_transform_peer.py"
    command = [sys.executable, peer, os.environ["TIMM"], picture, out, *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return [arrays[str(number)] for number in range(len(folders))]


def our_values(folder, picture):
    model, _ = mae_jax.load(folder)
    images = model.read_images(picture)
    return np.asarray(normalize(jnp.asarray(images), *model.info.stats(images.dtype)))[0]


def test_import(checkpoint, picture, tmp_path):
    sizes = [(64, 64), (48, 80)]
    modes, fractions = ("center", "squash", "border"), (1.0, 0.9, 0.875, 0.7)
    cases = list(itertools.product(sizes, modes, fractions))
    folders = []
    for number, (size, mode, fraction) in enumerate(cases):
        folder = tmp_path / str(number)
        weights.write(weights.resize_pos_embed(checkpoint, size), folder, "timm")
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"] |= {
            "crop_mode": mode,
            "crop_pct": fraction,
            "interpolation": INTERPOLATIONS[number % len(INTERPOLATIONS)],
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
        }
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    expected = run_timm(picture, folders, tmp_path / "out.npz")
    for case, folder, values in zip(cases, folders, expected):
        ours = our_values(folder, picture)
        assert ours.shape == values.shape == (*case[0], 3), case
        assert np.abs(ours - values).max() <= 2e-6, case


def test_export(checkpoint, picture, tmp_path):
    checkpoint = weights.resize_pos_embed(checkpoint, (64, 64))
    folders = []
    for name, changes in EXPORTS.items():
        info = dataclasses.replace(checkpoint.info, **changes)
        weights.write(dataclasses.replace(checkpoint, info=info), tmp_path / name, "timm")
        folders.append(tmp_path / name)
    expected = run_timm(picture, folders, tmp_path / "out.npz")
    for name, folder, values in zip(EXPORTS, folders, expected):
        assert np.abs(our_values(folder, picture) - values).max() <= 2e-6, name
