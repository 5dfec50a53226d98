"""The commands that take a checkpoint and images: what they write, and what they refuse."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from image_helpers import encoded, noise_image
from PIL import Image
from safetensors.numpy import load_file
from test_convert import HEADS, OFFICIAL

import mae_jax
from mae_jax import features, predict, reconstruct
from mae_jax.convert import cli as convert_cli
from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import DataError
from mae_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of five small pictures."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (40, 50 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def heads():
    return ["--num-heads", "2", "--decoder-num-heads", "2"]


def test_reconstruct(golden, images, heads, tmp_path, capsys):
    def run(name, *extra):
        out = tmp_path / "new" / name
        argv = [str(images), "--checkpoint", str(golden / OFFICIAL), "--out", str(out), *heads]
        reconstruct.main([*argv, "--target", "normalized", *extra])
        with Image.open(out) as picture:
            return np.asarray(picture)

    first = run("a.png")
    assert "a.png: 5 images" in capsys.readouterr().out
    np.testing.assert_array_equal(run("b.png"), first)
    assert not np.array_equal(run("c.png", "--seed", "1"), first)
    assert not np.array_equal(run("d.png", "--stats", "gt", "--mask", "grid"), first)
    with pytest.raises(UserError, match=r"mask.ratio=1.5"):
        run("e.png", "--mask-ratio", "1.5")
    assert run("wide.png", "--image-size", "64,32").shape[0] > first.shape[0]


def test_features(golden, images, tmp_path, capsys):
    checkpoint = golden / "hf" / "hf_tiny" / "pretrained_v5"
    out, picture = tmp_path / "f.npz", tmp_path / "attention.png"
    argv = [str(images), "--checkpoint", str(checkpoint), "--batch-size", "2", "--grid"]
    features.main([*argv, "--layers", "1,2", "--attention", str(picture), "--out", str(out)])
    assert "mean         float32 [5, 32]" in capsys.readouterr().out
    with np.load(out) as file:
        found = dict(file)
    assert [name.rsplit("/")[-1] for name in found["files"]] == [f"{i}.png" for i in range(5)]
    np.testing.assert_allclose(found["grid"].mean(axis=(1, 2)), found["mean"], atol=1e-6)
    np.testing.assert_array_equal(found["cls_2"], found["cls"])  # the last block of two
    assert (found["cls_1"] != found["cls"]).any()
    assert found["attention"].shape == (5, 4, 4)
    assert (found["attention"] > 0).all()
    assert (found["attention"].sum(axis=(1, 2)) < 1).all()  # the rest is the cls token's own
    with Image.open(picture) as image:
        assert image.size[1] > 5 * 112

    model, params = mae_jax.load(checkpoint)
    alone = model.features(params, model.read_images([images / "3.png"]))
    np.testing.assert_allclose(alone["mean"][0], found["mean"][3], atol=1e-5)
    with pytest.raises(ConvertError, match="no layer 3: .* has 1 to 2"):
        features.main([*argv, "--layers", "3", "--out", str(out)])


def test_features_after_fc_norm(golden, images):
    """What the head of a fine-tuned model takes is its "mean"."""
    model, params = mae_jax.load(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    pixels = model.read_images([images])
    head = params["head"]
    logits = model.features(params, pixels)["mean"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, model.logits(params, pixels), atol=1e-5)


def test_predict(golden, images, tmp_path, capsys):
    checkpoint = tmp_path / "named.safetensors"
    found = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    weights.write(found, checkpoint, "mae_jax")
    out, names = tmp_path / "p.csv", tmp_path / "names.txt"
    names.write_text("\n".join(f"animal {i}" for i in range(10)) + "\n")
    argv = [str(images), "--checkpoint", str(checkpoint), "--out", str(out)]
    predict.main([*argv, "--class-names", str(names), "--batch-size", "3"])
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 5 * 5
    assert rows[0]["name"] == f"animal {rows[0]['class']}"
    assert rows[0]["name"] in printed
    model, params = mae_jax.load(checkpoint)
    logits = np.asarray(model.logits(params, model.read_images([images])))
    first = [int(row["class"]) for row in rows if row["rank"] == "1"]
    assert first == logits.argmax(axis=1).tolist()
    names.write_text("one\n")
    with pytest.raises(ConvertError, match="has 1 lines for 10 classes"):
        predict.main([*argv, "--class-names", str(names)])


def test_outputs_are_checked_before_any_work(golden, images, tmp_path):
    argv = [str(images), "--checkpoint", "nowhere", "--out"]
    (tmp_path / "d.npz").mkdir()
    (tmp_path / "file").write_text("")
    for out, message in (
        ("d.npz", "is a directory"),
        ("f.txt", "must end in .npz"),
        ("file/f.npz", "is a file, not a directory"),
    ):
        with pytest.raises(ConvertError, match=message):
            features.main([*argv, str(tmp_path / out)])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "-1", "'-1' is not a number from 0 to 4294967295"),
        ("--seed", "99999999999999999999", "is not a number from 0 to"),
        ("--image-size", "0", "'0' is not a number from 1 up"),
        ("--image-size", "32,x", "'x' is not a number from 1 up"),
        ("--num-heads", "0", "'0' is not a number from 1 up"),
        ("--layer-norm-eps", "nan", "'nan' is not a number above 0"),
    ],
)
def test_odd_values_of_flags(images, tmp_path, capsys, flag, value, message):
    out = str(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        reconstruct.main([str(images), "--checkpoint", "x", "--out", out, f"{flag}={value}"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("model.image_size=(9, 9), patches of model.patch=8", "--image-size (9, 9), patches of 8"),
        ("an image of model.channels=4", "an image of --channels 4"),
        ("model.width=10 must be a multiple of 4", "width=10 must be a multiple of 4"),
        ("mask.ratio=2 and mask.kind='grid'", "--mask-ratio 2 and --mask 'grid'"),
        ("data.path='x' is not a directory", "--data-dir='x' is not a directory"),
        ("needs data.path, the folder", "needs --data-dir, the folder"),
    ],
)
def test_errors_name_flags(message, shown):
    assert convert_cli.as_flags(message) == shown


@pytest.mark.parametrize(
    "text",
    [
        "/a/model.safetensors",
        "model.a.safetensors",
        "pytorch_model.bin",
        "a/model.depth=2/x.pth",
        "data.path/0.png",
        "old_data.path",
        "torch.save(model.state_dict(), ...)",
        "--config.data.path=/images",
    ],
)
def test_errors_leave_files_and_code_alone(text):
    assert convert_cli.as_flags(f"cannot read {text}: no") == f"cannot read {text}: no"


def test_images_of_the_wrong_kind(golden):
    model, params = mae_jax.load(golden / OFFICIAL, target="pixels", **HEADS)
    for images in (
        np.zeros((1, 16, 16, 3), np.uint8),
        np.zeros((1, 32, 32, 1), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
    ):
        for method in (model.features, model.reconstruct):
            with pytest.raises(ValueError, match=r"this model takes .* \[b, 32, 32, 3\], of uint8"):
                method(params, images)


def test_sixteen_bits(golden, tmp_path):
    """Scaled, not clipped at 255; what has no known range is refused."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    model, _ = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4")
    (pixels,) = model.read_images(tmp_path / "a.png")
    np.testing.assert_allclose(pixels[..., 0], ramp / 257, atol=1)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match="b.tiff is bad: its pixels are 32-bit numbers"):
        model.read_images(tmp_path / "b.tiff")


def test_no_head(golden, images, heads, tmp_path):
    argv = [str(images), "--checkpoint", str(golden / OFFICIAL), *heads]
    with pytest.raises(ConvertError, match="no classification head.*mae_finetuned_vit_base.pth"):
        predict.main([*argv, "--out", str(tmp_path / "p.csv")])
    assert not (tmp_path / "p.csv").exists()


def test_bad_images_are_named_and_nothing_is_written(golden, images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not a picture")
    argv = ["--checkpoint", str(golden / "hf/hf_tiny/pretrained_v4"), "--out"]
    with pytest.raises(DataError, match=r"bad.jpg is bad: its bytes are not an image"):
        features.main([str(images), str(tmp_path / "bad.jpg"), *argv, str(tmp_path / "f.npz")])
    with pytest.raises(DataError, match="nowhere.jpg does not exist"):
        features.main([str(tmp_path / "nowhere.jpg"), *argv, str(tmp_path / "f.npz")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        features.main([str(tmp_path / "empty"), *argv, str(tmp_path / "f.npz")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jpg", "empty"]


def test_preparation_is_the_checkpoint_s_own(golden, images):
    """transformers squashes the whole image, bilinear; ours and the official code crop, bicubic."""
    with Image.open(images / "4.png") as file:
        picture = file.convert("RGB")
    model, _ = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4")
    squashed = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(model.read_images([images / "4.png"])[0], squashed)
    model, _ = mae_jax.load(golden / OFFICIAL, **HEADS)
    assert picture.size == (54, 40)  # to 32 / 0.875 = 36 rows
    central = picture.resize((48, 36), Image.Resampling.BICUBIC).crop((8, 2, 40, 34))
    np.testing.assert_array_equal(model.read_images([images / "4.png"])[0], central)


def test_channels_that_no_image_file_has(golden, tmp_path):
    found = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(weights.adapt_input_channels(found, 4), tmp_path / "four.safetensors", "mae_jax")
    model, _ = mae_jax.load(tmp_path / "four.safetensors")
    (tmp_path / "rgb.png").write_bytes(encoded(noise_image(0)))
    with pytest.raises(DataError, match=r"rgb.png is bad: .*image of model.channels=4"):
        model.read_images(tmp_path / "rgb.png")
    kernel = load_file(tmp_path / "four.safetensors")["encoder/patch_embed/kernel"]
    assert kernel.shape == (8 * 8 * 4, 32)


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md"])
def test_the_example_in_the_documentation(golden, page):
    root = Path(__file__).parent.parent
    (code,) = re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.DOTALL)
    code = code.replace("runs/demo", str(golden / "hf/hf_tiny/pretrained_v5"))
    names = {}
    exec(code.replace("docs/demo.png", str(root / "docs/demo.png")), names)  # noqa: S102
    assert names["picture"].dtype == np.uint8
    assert names["picture"].shape == names["images"].shape
