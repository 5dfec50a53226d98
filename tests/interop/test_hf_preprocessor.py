"""Pixel values of transformers' image processors for the same preprocessor_config.json."""

import dataclasses
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
from transformers import AutoImageProcessor, ViTImageProcessorPil

import mae_jax
from mae_jax.convert import weights
from mae_jax.models.image_ops import normalize

SIDE = 64
_VIT = {"image_processor_type": "ViTImageProcessor"}
SQUARE = {"height": SIDE, "width": SIDE}
CROP = {"do_center_crop": True, "crop_size": SQUARE}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

# Content of preprocessor_config.json; the class is ViTImageProcessor unless it is named.
CASES = {
    "class defaults": {"size": SQUARE},
    "numbers": {"size": SIDE, "image_mean": 0.5, "image_std": 0.25},
    "list": {"size": [SIDE, SIDE], "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "no rescaling": {
        "size": SQUARE,
        "do_rescale": False,
        "image_mean": [127.5, 120.0, 110.0],
        "image_std": [127.5, 60.0, 50.0],
    },
    "no rescaling, fractions": {"size": SQUARE, "do_rescale": False, **HALF},
    "other factor": {
        "size": SQUARE,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0] * 3,
        "image_std": [1.0] * 3,
    },
    "no normalization": {"size": SQUARE, "do_normalize": False, **HALF},
    "null is false": {"size": SQUARE, "do_normalize": None, "do_center_crop": None},
    "raw values": {"size": SQUARE, "do_normalize": False, "do_rescale": False},
    **{f"resample {code}": {"size": SQUARE, "resample": code} for code in range(6)},
    "squash and crop": {"size": {"height": 96, "width": 80}, **CROP},
    "odd squash and crop": {"size": {"height": 97, "width": 81}, **CROP},
    "pad": {"size": {"height": 47, "width": 71}, **CROP},
    "shortest edge": {"size": {"shortest_edge": 73}, **CROP, "resample": 3},
    "pad of the shortest edge": {"size": {"shortest_edge": 41}, **CROP},
    "shortest and longest edge": {"size": {"shortest_edge": 60, "longest_edge": 70}, **CROP},
    "longest edge unused": {"size": {"shortest_edge": 60, "longest_edge": 700}, **CROP},
    "fit": {"size": {"max_height": 64, "max_width": 50}, **CROP},
    "only crop": {"do_resize": False, **CROP, "crop_size": SIDE},
    "old name": {"feature_extractor_type": "ViTFeatureExtractor", "size": SIDE},
    "fast": {"image_processor_type": "ViTImageProcessorFast", "size": SQUARE},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": 72, "crop_size": SIDE},
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": 72, "crop_size": SIDE},
    "CLIP without crop": {
        "image_processor_type": "CLIPImageProcessor",
        "size": SQUARE,
        "do_center_crop": False,
    },
    "BiT": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": SQUARE,
    },
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "BEiT": {"image_processor_type": "BeitImageProcessor", "size": SQUARE},
}


@pytest.fixture(scope="module")
def model_folder(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "hf"
    checkpoint = weights.read(golden / OFFICIAL, target="pixels", **HEADS)
    weights.write(weights.resize_pos_embed(checkpoint, (SIDE, SIDE)), folder, "hf")
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Path of a wide picture with odd sides, fine and coarse structure."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((161, 121), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-30, 30, pixels.shape)
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


def our_values(folder, picture):
    model, _ = mae_jax.load(folder)
    images = model.read_images(picture)
    return np.asarray(normalize(jnp.asarray(images), *model.info.stats(images.dtype)))[0]


def their_values(folder, image, **options):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    values = processor(images=image, return_tensors="np", **options)["pixel_values"][0]
    return values.transpose(1, 2, 0)


def set_preprocessor(folder, content):
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


def assert_equal(ours, theirs):
    """Resizing is Pillow's in both, so only float32 rounding may differ."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2e-6 * max(1, np.abs(theirs).max())


@pytest.mark.parametrize("name", CASES)
def test_import(model_folder, picture, name):
    kind = {} if "feature_extractor_type" in CASES[name] else _VIT
    set_preprocessor(model_folder, kind | CASES[name])
    with Image.open(picture) as image:
        assert_equal(our_values(model_folder, picture), their_values(model_folder, image))
        if kind | CASES[name] == kind | {"size": SQUARE}:
            slow = ViTImageProcessorPil.from_pretrained(model_folder)
            values = slow(images=image, return_tensors="np")["pixel_values"][0]
            assert_equal(our_values(model_folder, picture), values.transpose(1, 2, 0))


def test_images_without_aspect_ratio_to_lose(model_folder, picture, tmp_path):
    """A tall image, a square one that shortest_edge suffices for, one that is not resized."""
    with Image.open(picture) as image:
        tall, square = image.transpose(Image.Transpose.ROTATE_90), image.crop((0, 0, 90, 90))
        exact = image.crop((0, 0, SIDE, SIDE))
    for image, content in (
        (tall, CASES["shortest edge"]),
        (tall, CASES["shortest and longest edge"]),
        (tall, CASES["fit"]),
        (square, {"size": {"shortest_edge": SIDE}}),
        (square, {"size": {"shortest_edge": 60, "longest_edge": SIDE}, **CROP}),
        (exact, {"do_resize": False}),
    ):
        image.save(tmp_path / "image.png")
        set_preprocessor(model_folder, _VIT | content)
        values = their_values(model_folder, image)
        assert_equal(our_values(model_folder, tmp_path / "image.png"), values)


def test_transparency_lies_on_white(model_folder, picture, tmp_path):
    with Image.open(picture) as image:
        image.putalpha(image.convert("L"))
        image.save(tmp_path / "alpha.png")
        set_preprocessor(model_folder, _VIT | {"size": SQUARE, "do_convert_rgb": True})
        values = their_values(model_folder, image)
    assert_equal(our_values(model_folder, tmp_path / "alpha.png"), values)


def test_torchvision_backend(model_folder, picture, tmp_path):
    """Its resizing is its own, up to one gray level away.

    It starts odd padding elsewhere, and its nearest neighbors may be other pixels.
    """
    other = ("resample", "pad", "fit", "shortest and longest edge")
    names = [name for name in CASES if not name.startswith(other)]
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        for file in model_folder.iterdir():
            os.link(file, folder / file.name)
        (folder / "preprocessor_config.json").unlink()
        kind = {} if "feature_extractor_type" in CASES[name] else _VIT
        set_preprocessor(folder, kind | CASES[name])
    peer = Path(__file__).parent / "fast_processor_peer.py"
    command = [sys.executable, peer, os.environ["TIMM"], picture, tmp_path / "out.npz"]
    command += [tmp_path / name for name in names]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as arrays:
        for number, name in enumerate(names):
            model, _ = mae_jax.load(tmp_path / name)
            ours, theirs = our_values(tmp_path / name, picture), arrays[str(number)]
            level = 1 / 255 / min(model.info.std)
            assert np.abs(ours - theirs).max() <= 1.001 * level, name


@pytest.mark.parametrize("rule", ["squash", "crop"])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.8])
def test_export(golden, picture, tmp_path, rule, crop):
    """AutoImageProcessor makes of a picture what our own model does."""
    info = {"resize": rule, "crop": crop, "interpolation": "lanczos", "pixels": "uint8"}
    folder = export(golden, tmp_path / "hf", **info)
    with Image.open(picture) as image:
        expected = their_values(folder, image)
    assert_equal(our_values(folder, picture), expected)
    # Without the metadata of the weights file, as if transformers had saved it.
    set_preprocessor(
        folder, json.loads((folder / "preprocessor_config.json").read_text()) | {"a": 1}
    )
    model, _ = mae_jax.load(folder)
    assert model.info.resize == ("squash" if (rule, crop) == ("squash", 1.0) else "processor")
    assert_equal(our_values(folder, picture), expected)


def export(golden, folder, channels=3, **info):
    checkpoint = weights.read(golden / OFFICIAL, target="pixels", **HEADS)
    checkpoint = weights.adapt(checkpoint, channels=channels, image_size=(SIDE, SIDE))
    info = dataclasses.replace(checkpoint.info, **info)
    weights.write(dataclasses.replace(checkpoint, info=info), folder, "hf")
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_export_of_other_units(golden, tmp_path, dtype, channels):
    """Arrays of 16 bits or floats: no rescaling, mean and std in the units of the values."""
    scale = {"uint16": 1000.0, "float32": 0.1}[dtype]
    mean, std = (tuple(scale * (i + 1) for i in range(channels)), (scale,) * channels)
    info = dict(mean=mean, std=std, pixels="other", resize="squash", crop=1.0)
    folder = export(golden, tmp_path / "hf", channels, **info)
    rng = np.random.default_rng(0)
    array = (scale * rng.uniform(0, 5, (SIDE, SIDE, channels))).astype(dtype)
    values = their_values(folder, array, input_data_format="channels_last")
    np.testing.assert_allclose(values, (array - np.array(mean)) / np.array(std), atol=1e-5)
    np.save(tmp_path / "x.npy", array)
    assert_equal(our_values(folder, tmp_path / "x.npy"), values)
    # Images of another size are resized, as before the conversion.
    np.save(tmp_path / "larger.npy", array.repeat(2, axis=0).repeat(2, axis=1))
    model, _ = mae_jax.load(folder)
    assert model.read_images(tmp_path / "larger.npy").shape == (1, SIDE, SIDE, channels)
