"""Exported StableHLO files: loaded without mae_jax, they compute what the model computes."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL, random_weights
from image_helpers import photograph
from jax import export as jax_export

import mae_jax
from mae_jax.convert import export, weights
from mae_jax.convert.model_info import ConvertError
from mae_jax.tasks.masking import mask_from_noise
from mae_jax.utils.errors import UserError

FLAGS = ["--num-heads", "2", "--decoder-num-heads", "2", "--target", "normalized"]
# Run by a process that has not imported mae_jax: ARGV is pairs of an exported file and an .npz file
# of its inputs, which is replaced by its outputs.
SERVE = """
import sys
import jax
import numpy as np
from jax import export

for program, arrays in zip(sys.argv[1::2], sys.argv[2::2]):
    exported = export.deserialize(bytearray(open(program, "rb").read()))
    inputs = list(np.load(arrays).values())
    np.savez(arrays, **jax.jit(exported.call)(*inputs))
assert not {"mae_jax", "flax"} & {name.split(".")[0] for name in sys.modules}
"""


def read(path):
    """Return the function of an exported file, and its metadata."""
    exported = jax_export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    return exported.call, json.loads(exported.fun_name)


def images_of(count, size=(32, 32)):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def official(golden):
    return mae_jax.load(golden / OFFICIAL, target="normalized", **HEADS)


def test_features_and_reconstructions_without_mae_jax(golden, official, tmp_path, capsys):
    (model, params), images = official, images_of(3)
    files = [tmp_path / f"{output}.stablehlo" for output in ("features", "reconstruction")]
    for file in files:
        extra = ["--mask-ratio", "0.5"] if file.stem == "reconstruction" else []
        flags = ["--output", file.stem, *extra, *FLAGS]
        export.main([str(golden / OFFICIAL), str(file), *flags])
    printed = capsys.readouterr().out
    assert "input  images          uint8 [b, 32, 32, 3]" in printed
    assert "input  noise           float32 [b, 16]" in printed
    assert "output grid            float32 [b, 4, 4, 32]" in printed

    noise = np.random.default_rng(1).random((3, 16), np.float32)
    arrays = [tmp_path / "features.npz", tmp_path / "reconstruction.npz"]
    np.savez(arrays[0], images=images)
    np.savez(arrays[1], images=images, noise=noise)
    arguments = [str(path) for pair in zip(files, arrays) for path in pair]
    subprocess.run([sys.executable, "-c", SERVE, *arguments], check=True, cwd=tmp_path)

    assert_close(dict(np.load(arrays[0])), model.features(params, images, grid=True))
    mask = mask_from_noise(jnp.asarray(noise), 8)
    expected = model.task(mask_ratio=0.5).reconstruct(params, jnp.asarray(images), mask, "visible")
    actual = np.load(arrays[1])["reconstruction"]
    assert actual.dtype == np.uint8
    assert np.abs(actual.astype(int) - expected).max() <= 1, "gray level: rounding"


@pytest.mark.parametrize(
    ("info", "shape"),
    [
        (dict(pool="mean", fc_norm=True), (5,)),
        (dict(pool="grid", upsample_width=4), (16, 16, 5)),
    ],
    ids=["finetuned", "segmentation"],
)
def test_logits(tmp_path, info, shape):
    names = tuple("abcde")
    checkpoint, file = tmp_path / "model.safetensors", tmp_path / "model.stablehlo"
    made = random_weights(num_classes=5, class_names=names, image_size=(16, 16), **info)
    weights.write(made, checkpoint, "mae_jax")
    export.main([str(checkpoint), str(file)])
    call, metadata = read(file)
    model, params = mae_jax.load(checkpoint)
    for count in (1, 2):
        images = images_of(count, (16, 16))
        expected = model.logits(params, images)
        assert expected.shape == (count, *shape)
        assert_close(call(images), {"logits": expected})
    assert metadata["class_names"] == list(names)
    assert metadata["problem"] == model.info.problem
    assert metadata["outputs"] == {"logits": {"shape": ["b", *shape], "dtype": "float32"}}
    assert metadata["versions"]["mae_jax"] == mae_jax.__version__
    assert metadata["image_size"] == [16, 16]


@pytest.mark.parametrize(
    "rule",
    [
        dict(resize="crop", crop=0.875, interpolation="bicubic"),
        dict(resize="squash", crop=1.0, interpolation="bilinear"),
    ],
    ids=["crop", "squash"],
)
def test_resizing_inside_is_that_of_read_images(official, rule):
    model, params = official
    model = dataclasses.replace(model, info=dataclasses.replace(model.info, **rule))
    content = export.to_stablehlo(export.make_program(model, params, resize=True))
    exported = jax_export.deserialize(bytearray(content))
    resize = export._make_resize(model)
    for rows, columns in ((61, 91), (43, 113)):
        picture = np.asarray(photograph())[:rows, :columns]
        expected = model.transform(picture)["image"]
        resized = np.asarray(resize(jnp.asarray(picture[None])))
        differs = resized[0] != expected
        assert differs.mean() < 1e-2
        assert np.abs(resized[0].astype(int) - expected).max() <= 1, (
            "rounded the other way at a half"
        )
        features = model.features(params, resized, grid=True)
        assert_close(exported.call(picture[None]), features)


def test_bfloat16_computes_the_same_with_smaller_files(golden, official):
    model, params = mae_jax.load(golden / OFFICIAL, dtype="bfloat16", **HEADS)
    content = export.to_stablehlo(export.make_program(model, params))
    assert len(content) < 0.8 * len(export.to_stablehlo(export.make_program(*official)))
    images = images_of(2)
    actual = jax_export.deserialize(bytearray(content)).call(images)
    assert_close(actual, model.features(params, images, grid=True))


def test_models_of_other_images_take_float32(official):
    model, params = official
    info = dataclasses.replace(model.info, mean=(300.0,) * 3, std=(90.0,) * 3, pixels="other")
    model = dataclasses.replace(model, info=info)
    program = export.make_program(model, params)
    assert program.metadata["inputs"]["images"]["dtype"] == "float32"
    with pytest.raises(ConvertError, match="--resize is for uint8 images"):
        export.make_program(model, params, resize=True)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("x.pt", [], r"OUT .*x.pt must end in .stablehlo or .onnx"),
        ("x.stablehlo", ["--output", "logits"], "has no classification head"),
        ("x.stablehlo", ["--mask-ratio", "0.5"], "--mask-ratio is for --output reconstruction"),
        ("x.onnx", ["--resize"], "--resize is for .stablehlo files only"),
        ("x.onnx", ["--dtype", "bfloat16"], "--dtype bfloat16 is for .stablehlo files only"),
    ],
)
def test_errors(golden, tmp_path, monkeypatch, name, flags, message):
    monkeypatch.setattr(export.onnx_io, "require_jax2onnx", lambda: None)
    with pytest.raises(UserError, match=message):
        export.main([str(golden / OFFICIAL), str(tmp_path / name), *FLAGS, *flags])
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_decoder_does_not_reconstruct(tmp_path):
    weights.write(random_weights(), tmp_path / "encoder.safetensors", "mae_jax")
    model, params = mae_jax.load(tmp_path / "encoder.safetensors")
    with pytest.raises(ConvertError, match="encoder.safetensors has no decoder"):
        export.make_program(model, params, output="reconstruction")


def test_rules_of_other_filters_are_not_inside(official):
    model, params = official
    model = dataclasses.replace(
        model, info=dataclasses.replace(model.info, interpolation="lanczos")
    )
    with pytest.raises(ConvertError, match="the rule of .* is crop with lanczos: export without"):
        export.make_program(model, params, resize=True)


def test_too_many_parameters(official, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 10**5)
    with pytest.raises(ConvertError, match="0.00 GiB of parameters.*--dtype bfloat16"):
        export.make_program(*official)


def test_a_missing_package_is_named(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(export.onnx_io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConvertError, match=r"pip install 'mae_jax\[onnx\]'"):
        export.main([str(golden / OFFICIAL), str(tmp_path / "x.onnx"), *FLAGS])


def test_an_old_file_is_kept_unless_a_new_one_is_complete(golden, tmp_path, monkeypatch):
    file = tmp_path / "x.stablehlo"
    file.write_text("old")
    arguments = [str(golden / OFFICIAL), str(file), *FLAGS]
    with pytest.raises(ConvertError, match="exists: choose another path, or .* --overwrite"):
        export.main(arguments)

    def fill_the_disk(path, content):
        path.write_text("partial")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left on device.*x.stablehlo"):
        export.main([*arguments, "--overwrite"])
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"
