"""timm's RandAugment operations against ours, pixel for pixel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.randaugment import OPERATIONS, OpParams

TIMM = os.environ["TIMM"]  # where `pip install --target` put it; the Makefile knows
FILL = (124, 116, 104)
# All that timm 1.0.31 computes otherwise than 0.3.2: factors of color, contrast, brightness and
# sharpness are at least .1. Ours, 1 - .9, is less by a rounding error, which no pixel shows.
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
    """Noise over a ramp, whose values do not fill the range."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 180, 57)[None, :, None]
    pixels = (ramp + rng.uniform(0, 60, (38, 57, 3))).astype(np.uint8)
    return {"RGB": pixels, "L": pixels[..., 0]}


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """What timm makes of the images, for every operation, mode, sign and level."""
    folder = tmp_path_factory.mktemp("timm")
    images = make_images()
    np.savez(folder / "in.npz", **images, modes=list(images), fill=FILL, levels=LEVELS)
    peer = Path(__file__).parent / "augment_peer.py"
    command = [sys.executable, peer, TIMM, folder / "in.npz", folder / "out.npz"]
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return dict(np.load(folder / "out.npz"))


def test_operations_are_timms(timm):
    assert {key.split()[0] for key in timm} == set(NAMES)
    assert set(NAMES.values()) == set(OPERATIONS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_timms(timm, name, mode):
    image = Image.fromarray(make_images()[mode])
    cases = [key for key in timm if key.startswith(f"{name} {mode} ")]
    assert len(cases) >= 2 * (len(LEVELS) - 1)
    for case in cases:
        sign, level = case.split()[2:]
        draw = OpParams(float(level), int(sign), FILL if mode == "RGB" else FILL[0])
        changed = OPERATIONS[NAMES[name]](image, draw)
        np.testing.assert_array_equal(np.asarray(changed), timm[case], err_msg=case)
