"""Preprocessing in the config files of Hugging Face and timm, without either of them.

tests/interop compares it with both.
"""

import dataclasses
import json
import logging
import math

import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from PIL import Image

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.hf_preprocessor import hf_preprocessor, parse_hf_preprocessor
from mae_jax.convert.hf_timm import timm_config
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.preprocessing import as_crop, center_crop, resized_size, with_image_size
from mae_jax.data.sources import DataError
from mae_jax.models.image_ops import IMAGENET_MEAN

SIDE = 32
CROP = {"do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}


@pytest.fixture
def checkpoint(golden):
    return weights.read(golden / OFFICIAL, target="pixels", **HEADS)


@pytest.fixture
def info(checkpoint):
    return checkpoint.info


def parse(file, channels=3):
    return parse_hf_preprocessor(file, channels, (SIDE, SIDE))


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------- preprocessor_config.json


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "'ConvNextImageProcessor' is not"),
        ({"feature_extractor_type": "LevitFeatureExtractor"}, "'LevitFeatureExtractor' is not"),
        ({"do_pad": True}, "do_pad=True is not supported"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order=True is not supported"),
        ({"resample": 6}, r"resample=6 must be one of 0 \(nearest\), 1 \(lanczos\)"),
        ({"resample": None}, "resample=None must be one of"),
        ({"resample": "bicubic"}, "resample='bicubic' must be one of"),
        ({"rescale_factor": 0}, "rescale_factor=0 must be a finite number above 0"),
        ({"rescale_factor": None}, "rescale_factor=None must be"),
        ({"image_mean": "0.5"}, "image_mean='0.5' must be one finite number, or one per channel"),
        ({"image_std": [0, 0, 0]}, r"image_std=\[0, 0, 0\] must be above 0"),
        ({"image_mean": math.nan}, "image_mean=nan must be one finite number"),
        ({"image_mean": [0.5]}, "image_mean has 1 numbers for 3 channels"),
        ({"image_std": None}, "image_std=None must be"),
        ({"size": {"height": 96, "width": 96}}, "images of 96 x 96 pixels, but image_size"),
        ({"size": 96, **CROP, "crop_size": 48}, "images of 48 x 48 pixels, but image_size"),
        ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32} must be a number of pixels"),
        ({"size": {"min_pixels": 1, "max_pixels": 9}}, "size={'min_pixels': 1"),
        ({"size": {"height": 32}}, "size={'height': 32} must be"),
        ({"size": 32.0}, "size=32.0 must be"),
        ({"size": True}, "size=True must be whole numbers"),
        ({"size": [32, 0]}, "size=.32, 0. must be whole numbers of pixels above 0"),
        ({"size": None}, "size=None must be"),
        ({"do_center_crop": True}, "crop_size=None must be"),
        ({**CROP, "crop_size": {"shortest_edge": 32}}, "crop_size={.*} must be height and width"),
    ],
    ids=str,
)
def test_what_cannot_be_honored_is_refused(file, message):
    with pytest.raises(ConvertError, match=f"preprocessor_config.json: .*{message}.* Correct the"):
        parse(file)


def test_conversion_to_rgb_needs_three_channels():
    with pytest.raises(ConvertError, match="do_convert_rgb is true, but num_channels .* is 1"):
        parse({"do_convert_rgb": True}, channels=1)
    assert parse({"do_convert_rgb": True})["alpha"] == "white"
    assert parse({})["alpha"] == "drop"


@pytest.mark.parametrize(
    ("file", "mean", "std", "pixels"),
    [
        ({}, 0.5, 0.5, "uint8"),
        ({"image_mean": 0.25, "image_std": 0.125}, 0.25, 0.125, "uint8"),
        ({"do_normalize": False}, 0.0, 1.0, "uint8"),
        ({"rescale_factor": 2 / 255, "image_mean": 1.0, "image_std": 1.0}, 0.5, 0.5, "uint8"),
        ({"do_rescale": False, "image_mean": 51.0, "image_std": 25.5}, 0.2, 0.1, "any"),
        ({"do_rescale": False, "do_normalize": False}, 0.0, 1 / 255, "any"),
        ({"rescale_factor": 1, "image_mean": 51, "image_std": 51}, 0.2, 0.2, "any"),
        ({"do_rescale": False, "image_mean": 1600, "image_std": 800}, 1600, 800, "other"),
        ({"rescale_factor": 1 / 65535}, 32767.5, 32767.5, "other"),
    ],
    ids=str,
)
def test_mean_and_std(file, mean, std, pixels):
    metadata = parse(file)
    assert metadata["pixels"] == pixels
    np.testing.assert_allclose(metadata["mean"], [mean] * 3)
    np.testing.assert_allclose(metadata["std"], [std] * 3)


def test_units_by_dtype(info):
    """Without rescaling, floats are normalized by the same numbers as uint8."""
    fields = parse({"do_rescale": False, "image_mean": 51.0, "image_std": 25.5})
    info = dataclasses.replace(info, **fields)
    np.testing.assert_allclose(info.stats(np.uint8), [[0.2] * 3, [0.1] * 3])
    np.testing.assert_allclose(info.stats(np.float32), [[51.0] * 3, [25.5] * 3])


@pytest.mark.parametrize(
    ("pixels", "mean", "dtypes"),
    [
        ("uint8", 0.5, ["uint8"]),
        ("other", 0.5, ["uint16", "float32"]),
        ("any", 0.5, ["uint8", "uint16", "float32"]),
        ("unknown", 0.5, ["uint8", "uint16", "float32"]),
        ("unknown", 1600.0, ["uint16", "float32"]),
    ],
)
def test_images_of_other_units_are_refused(checkpoint, tmp_path, pixels, mean, dtypes):
    info = dataclasses.replace(checkpoint.info, pixels=pixels, mean=(mean,) * 3)
    weights.write(dataclasses.replace(checkpoint, info=info), tmp_path / "w.safetensors", "mae_jax")
    model, params = mae_jax.load(tmp_path / "w.safetensors")
    for dtype in ("uint8", "uint16", "float32"):
        assert model.info.accepts(np.dtype(dtype)) == (dtype in dtypes), dtype
    refused = {"uint8", "uint16", "float32"} - {*dtypes}
    for dtype in refused:
        with pytest.raises(ValueError, match=f"images are {dtype}"):
            model.features(params, np.zeros((1, SIDE, SIDE, 3), dtype))
        np.save(tmp_path / "image.npy", np.zeros((SIDE, SIDE, 3), dtype))
        with pytest.raises(DataError, match=rf"image.npy is read as {dtype}, but the mean"):
            model.read_images(tmp_path / "image.npy")


@pytest.mark.parametrize(
    ("size", "image", "expected"),
    [
        ({}, (30, 50), (30, 50)),
        ({"height": 7, "width": 9}, (30, 50), (7, 9)),
        ({"shortest_edge": 20}, (30, 50), (20, 33)),
        ({"shortest_edge": 20}, (50, 30), (33, 20)),
        ({"shortest_edge": 20, "longest_edge": 30}, (30, 50), (18, 30)),
        ({"shortest_edge": 20, "longest_edge": 99}, (50, 30), (33, 20)),
        ({"max_height": 20, "max_width": 20}, (30, 50), (12, 20)),
    ],
)
def test_sizes_of_a_processor(info, size, image, expected):
    info = dataclasses.replace(info, resize="processor", size=tuple(size.items()))
    assert resized_size(info, image) == expected


def test_center_crop_and_padding():
    image = np.arange(1, 16, dtype=np.uint8).reshape(3, 5, 1)
    cropped = center_crop(image, (2, 2), [0], round_down=True)
    np.testing.assert_array_equal(cropped[..., 0], [[2, 3], [7, 8]])
    rounded = center_crop(image, (3, 2), [0], round_down=False)
    np.testing.assert_array_equal(rounded[:, :, 0], image[:, 2:4, 0])
    for round_down, top in ((True, 2), (False, 1)):
        padded = center_crop(image, (6, 5), [7], round_down=round_down)
        np.testing.assert_array_equal(padded[top : top + 3], image)
        assert (np.delete(padded, range(top, top + 3), axis=0) == 7).all()


def test_an_image_of_a_wrong_size_names_the_settings(checkpoint, tmp_path):
    weights.write(checkpoint, tmp_path / "hf", "hf")
    change(tmp_path / "hf/preprocessor_config.json", do_resize=False, do_center_crop=False)
    Image.new("RGB", (48, 40)).save(tmp_path / "x.png")
    model, _ = mae_jax.load(tmp_path / "hf")
    with pytest.raises(DataError, match=r"x.png .* 40 x 48 pixels, .* 32 x 32: set do_resize"):
        model.read_images(tmp_path / "x.png")


def test_image_size_scales_the_processor(checkpoint, tmp_path):
    weights.write(checkpoint, tmp_path / "hf", "hf")
    change(tmp_path / "hf/preprocessor_config.json", size={"shortest_edge": 40}, **CROP)
    model, _ = mae_jax.load(tmp_path / "hf", image_size=(64, 48))
    assert (model.info.size, model.info.crop_size) == ((("shortest_edge", 80),), (64, 48))
    squash = dataclasses.replace(model.info, size=(("height", 80), ("width", 80)))
    assert with_image_size(squash, (32, 96)).size == (("height", 40), ("width", 160))
    Image.new("RGB", (90, 70)).save(tmp_path / "x.png")
    assert model.read_images(tmp_path / "x.png").shape == (1, 64, 48, 3)


# ---------------------------------------------------------------- written files


def test_a_written_processor(info):
    written = hf_preprocessor(info)
    assert written["image_processor_type"] == "BitImageProcessor", "the one with a center crop"
    assert written["size"] == {"shortest_edge": 36}
    assert written["crop_size"] == {"height": 32, "width": 32}
    assert (written["do_rescale"], written["rescale_factor"]) == (True, 1 / 255)
    squash = hf_preprocessor(dataclasses.replace(info, resize="squash", crop=1.0))
    assert squash["image_processor_type"] == "ViTImageProcessor"
    assert "crop_size" not in squash
    raw = dataclasses.replace(info, mean=(0.2,) * 3, std=(0.1,) * 3, pixels="any")
    assert hf_preprocessor(raw)["do_rescale"] is False
    np.testing.assert_allclose(hf_preprocessor(raw)["image_mean"], 51.0)


def test_written_units_of_a_bit_depth(info):
    """The model takes fractions of the range; the processor gets the values of the files."""
    info = dataclasses.replace(info, bit_depth=12, pixels="other", mean=(0.3,) * 3)
    written = hf_preprocessor(info)
    assert (written["do_rescale"], written["rescale_factor"]) == (True, 1 / 4095)
    assert written["image_mean"] == [0.3] * 3
    assert not written["do_resize"]
    np.testing.assert_allclose(parse(written)["mean"], 0.3 * 4095)


@pytest.mark.parametrize("mean", [1600.0, 0.3])
def test_models_of_other_units(checkpoint, tmp_path, caplog, mean):
    """The mean alone does not tell reflectances of 0 to 1 from fractions of 255."""
    stats = dict(mean=(mean,) * 3, std=(mean / 2,) * 3, pixels="other")
    checkpoint = weights.encoder_only(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, info=dataclasses.replace(checkpoint.info, **stats))
    for dialect in ("hf", "timm"):
        weights.write(checkpoint, tmp_path / dialect, dialect)
        info = weights.read(tmp_path / dialect).info
        assert dataclasses.replace(info, source="") == dataclasses.replace(
            checkpoint.info, source=""
        )
    assert "do_resize=false, so pass it arrays of 32 x 32" in caplog.text
    written = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert not written["do_rescale"]
    assert not written["do_resize"]
    assert written["image_mean"] == [mean] * 3
    config = json.loads((tmp_path / "timm/config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [mean] * 3


def test_edited_files_win_over_the_metadata_of_the_weights(checkpoint, tmp_path):
    weights.write(checkpoint, tmp_path / "hf", "hf")
    file = tmp_path / "hf/preprocessor_config.json"
    assert weights.read(tmp_path / "hf").info.resize == "crop"
    change(file, resample=4)
    info = weights.read(tmp_path / "hf").info
    assert (info.resize, info.interpolation) == ("processor", "box")
    assert (info.size, info.crop_size) == ((("shortest_edge", 36),), (32, 32))
    weights.write(weights.read(tmp_path / "hf"), tmp_path / "again", "hf")
    assert json.loads((tmp_path / "again/preprocessor_config.json").read_text()) == json.loads(
        file.read_text()
    )
    file.unlink()
    assert weights.read(tmp_path / "hf").info.mean == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (dict(resize="crop", crop=0.8), ("crop", 0.8)),
        (dict(resize="squash", crop=1.0), ("squash", 1.0)),
        (dict(size={"shortest_edge": 36}), ("crop", 32 / 36)),
        (dict(size={"height": 40, "width": 40}), ("squash", 0.8)),
        (dict(size={"height": 40, "width": 50}), None),
        (dict(size={"shortest_edge": 30}), None),
        (dict(size={"shortest_edge": 36, "longest_edge": 50}), None),
        (dict(size={}), None),
    ],
    ids=str,
)
def test_rules_of_timm(info, changes, rule, caplog):
    if "size" in changes:
        size = tuple(changes["size"].items())
        changes = dict(resize="processor", crop=1.0, size=size, crop_size=(SIDE, SIDE))
    info = dataclasses.replace(info, **changes)
    assert as_crop(info) == (rule and (rule[0], pytest.approx(rule[1])))
    written = timm_config(info)["pretrained_cfg"]
    assert written["crop_mode"] == ("squash" if rule is None or rule[0] == "squash" else "center")


def test_every_resized_size_has_a_fraction_of_timm(info):
    """floor(cropped / fraction) is the size before the crop, in spite of rounding."""
    for side in range(32, 200):
        fields = dict(resize="processor", size=(("shortest_edge", side),), crop_size=(32, 32))
        _, fraction = as_crop(dataclasses.replace(info, **fields))
        assert int(32 / fraction) == side


def test_lossy_preprocessing_warns(checkpoint, tmp_path, caplog):
    checkpoint = weights.encoder_only(checkpoint)
    border = dataclasses.replace(checkpoint.info, resize="border", crop=1.0)
    processor = dataclasses.replace(border, resize="processor", crop_size=(32, 32))
    for number, (info, dialect, message) in enumerate(
        (
            (border, "hf", "cannot express the preprocessing 'border'"),
            (processor, "timm", "timm's pretrained_cfg cannot express the size={}"),
        )
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            weights.write(
                dataclasses.replace(checkpoint, info=info), tmp_path / str(number), dialect
            )
        assert message in caplog.text


# ---------------------------------------------------------------- pretrained_cfg of timm


BAD_TIMM = (
    ("pretrained_cfg", {"crop_mode": "corner"}, "one of center, squash, border"),
    ("pretrained_cfg", {"crop_mode": ["center"]}, "one of center, squash, border"),
    ("pretrained_cfg", {"interpolation": "random"}, "one of nearest, lanczos"),
    ("pretrained_cfg", {"crop_pct": 1.5}, "a number above 0 and at most 1"),
    ("pretrained_cfg", {"crop_pct": "a"}, "a number above 0 and at most 1"),
    ("pretrained_cfg", {"crop_pct": [0.9]}, "a number above 0 and at most 1"),
    ("pretrained_cfg", {"mean": [0.5, 0.5]}, "3 finite numbers, one per channel"),
    ("pretrained_cfg", {"mean": 0.5}, "3 finite numbers, one per channel"),
    ("pretrained_cfg", {"mean": [0.5, None, 0.5]}, "3 finite numbers, one per channel"),
    ("pretrained_cfg", {"std": [0.0]}, "3 finite numbers above 0, one per channel"),
    ("pretrained_cfg", {"std": [0.5, 0.5, math.inf]}, "3 finite numbers above 0"),
    ("pretrained_cfg", {"input_size": [1, 32]}, "channels, height and width"),
    ("pretrained_cfg", {"input_size": "32"}, "channels, height and width"),
    ("pretrained_cfg", {"input_size": [3, 32.5, 32]}, "channels, height and width"),
    ("pretrained_cfg", {"input_size": [3, 64, 64]}, r"\[3, 32, 32\], as model_args says"),
    ("pretrained_cfg", {"input_size": [1, 32, 32]}, r"\[3, 32, 32\], as model_args says"),
    ("model_args", {"img_size": 64}, r"\[3, 64, 64\], as model_args says"),
    ("model_args", {"img_size": [32]}, "height and width"),
)


def test_timm_config_that_cannot_be_honored(checkpoint, tmp_path, subtests):
    weights.write(checkpoint, tmp_path / "timm", "timm")
    file = tmp_path / "timm/config.json"
    written = json.loads(file.read_text())
    for group, changes, expected in BAD_TIMM:
        change(file, **written | {group: written[group] | changes})
        name = "input_size" if "model_args says" in expected else [*changes][0]
        message = f"config.json: .*{name}=.* must be {expected}"
        with subtests.test(changes=changes), pytest.raises(ConvertError, match=message):
            weights.read(tmp_path / "timm")
    for change_of_group in ({"pretrained_cfg": 3}, {"model_args": []}, {"label_names": "cat"}):
        change(file, **written | change_of_group)
        (name,) = change_of_group
        with pytest.raises(ConvertError, match=f"config.json: {name}=.* must be"):
            weights.read(tmp_path / "timm")


def test_pretrained_cfg(checkpoint, tmp_path):
    weights.write(weights.resize_pos_embed(checkpoint, (32, 48)), tmp_path / "timm", "timm")
    file = tmp_path / "timm/config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"] |= {"mean": [0.5], "std": [0.25], "crop_pct": None}
    del config["model_args"]["img_size"]
    file.write_text(json.dumps(config))
    info = weights.read(tmp_path / "timm").info
    assert (info.mean, info.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (info.image_size, info.resize, info.crop) == ((32, 48), "cover", 0.875)
