"""RandAugment operations are pixel-identical to timm's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.randaugment import OPERATIONS, OpParams

TIMM = os.environ["TIMM"]  # folder of `pip install --target`, set by the Makefile
FILL = (124, 116, 104)
# timm 1.0.31 differs from 0.3.2 only in clipping the factors of color, contrast, brightness and
# sharpness at 0.1. Ours (1 - 0.9) is less by a rounding error, which changes no pixel.
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.77, 0.9, 0.99, 1.0)
NAMES = {
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
    "Invert": "invert",
    "Rotate": "rotate",
    "PosterizeIncreasing": "posterize",
    "SolarizeIncreasing": "solarize",
    "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "color",
    "ContrastIncreasing": "contrast",
    "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}


def make_images():
    """Return noise over a ramp, without the extreme values."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 180, 57)[None, :, None]
    pixels = (ramp + rng.uniform(0, 60, (38, 57, 3))).astype(np.uint8)
    return {"RGB": pixels, "L": pixels[..., 0]}


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """timm's outputs by operation, mode, sign and level."""
    folder = tmp_path_factory.mktemp("timm")
    images = make_images()
    np.savez(folder / "in.npz", **images, modes=list(images), fill=FILL, levels=LEVELS)
    peer = Path(__file__).parent / "augment_peer.py"
    command = [sys.executable, peer, TIMM, folder / "in.npz", folder / "out.npz"]
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return dict(np.load(folder / "out.npz"))


def test_operations_are_those_of_timm(timm):
    assert {key.split()[0] for key in timm} == set(NAMES)
    assert set(NAMES.values()) == set(OPERATIONS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_equal_timm(timm, name, mode):
    image = Image.fromarray(make_images()[mode])
    cases = [key for key in timm if key.startswith(f"{name} {mode} ")]
    assert len(cases) >= 2 * (len(LEVELS) - 1)
    for case in cases:
        sign, level = case.split()[2:]
        params = OpParams(float(level), int(sign), FILL if mode == "RGB" else FILL[0])
        output = OPERATIONS[NAMES[name]](image, params)
        np.testing.assert_array_equal(np.asarray(output), timm[case], err_msg=case)
