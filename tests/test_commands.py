"""The commands that take a checkpoint and images: their output and their errors."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from image_helpers import encoded, noise_image
from PIL import Image
from safetensors.numpy import load_file

import mae_jax
from mae_jax import features, predict, reconstruct
from mae_jax.convert import __main__ as convert
from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import DataError
from mae_jax.utils import cli
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of five small images."""
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
        arrays = dict(file)
    assert [name.rsplit("/")[-1] for name in arrays["files"]] == [f"{i}.png" for i in range(5)]
    np.testing.assert_allclose(arrays["grid"].mean(axis=(1, 2)), arrays["mean"], atol=1e-6)
    np.testing.assert_array_equal(arrays["cls_2"], arrays["cls"])  # the last block of two
    assert (arrays["cls_1"] != arrays["cls"]).any()
    assert arrays["attention"].shape == (5, 4, 4)
    assert (arrays["attention"] > 0).all()
    # The rest is the attention of the cls token to itself.
    assert (arrays["attention"].sum(axis=(1, 2)) < 1).all()
    with Image.open(picture) as image:
        assert image.size[1] > 5 * 112

    model, params = mae_jax.load(checkpoint)
    alone = model.features(params, model.read_images([images / "3.png"]))
    np.testing.assert_allclose(alone["mean"][0], arrays["mean"][3], atol=1e-5)
    with pytest.raises(ConvertError, match="no layer 3: .* has 1 to 2"):
        features.main([*argv, "--layers", "3", "--out", str(out)])


def test_features_after_fc_norm(golden, images):
    """The head of a fine-tuned model takes its "mean"."""
    model, params = mae_jax.load(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    pixels = model.read_images([images])
    head = params["head"]
    logits = model.features(params, pixels)["mean"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, model.logits(params, pixels), atol=1e-5)


def test_predict(golden, images, tmp_path, capsys):
    checkpoint = tmp_path / "named.safetensors"
    checkpoint_weights = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    weights.write(checkpoint_weights, checkpoint, "mae_jax")
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


def test_output_paths_are_checked_first(images, tmp_path, subtests):
    argv = [str(images), "--checkpoint", "nowhere", "--out"]
    (tmp_path / "d.npz").mkdir()
    (tmp_path / "file").write_text("")
    for link, target in (
        ("dangling", "gone"),
        ("dangling.npz", "gone.npz"),
        ("loop", "loop"),
        ("loop.npz", "loop.npz"),
        ("null.npz", "/dev/null"),
        ("d_too.npz", "d.npz"),
    ):
        (tmp_path / link).symlink_to(target)
    before = sorted(tmp_path.iterdir())
    odd = (
        ("file/f.npz", "is a file, not a directory"),
        ("dangling.npz", "is a symlink to gone.npz, which is no file"),
        ("dangling/f.npz", "dangling is a symlink to gone, which"),
        ("loop.npz", "is a symlink to loop.npz, which"),
        ("loop/a/f.npz", "loop is a symlink to loop, which"),
        ("null.npz", "is neither a file nor a folder"),
        (f"{300 * 'a'}.npz", "cannot be written: File name too long"),
        (f"new/{100 * 'é£'}.npz", "a name has 404 bytes, more than 255"),
        ("/proc/f.npz", "cannot be written: "),
    )
    files = (
        ("d.npz", "is a directory"),
        ("d_too.npz", "is a directory"),
        ("f.txt", "must end in .npz"),
        *odd,
    )
    for out, message in files:
        with subtests.test(out=out), pytest.raises(UserError, match=message):
            features.main([*argv, str(tmp_path / out)])
    for out, message in odd:
        with subtests.test(converted=out), pytest.raises(UserError, match=message):
            convert.main(["nowhere", str(tmp_path / out), "--to", "mae_jax"])
    assert sorted(tmp_path.iterdir()) == before


def test_the_target_of_a_link_is_written(tmp_path):
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    target, link = tmp_path / "there" / "a.json", tmp_path / "here" / "b.json"
    target.write_text("old")
    link.symlink_to("../there/a.json")
    cli.check_output("--out", link, ".json")
    with pytest.raises(TypeError):
        write_json(link, object())
    assert target.read_text() == "old"
    write_json(link, "new")
    assert json.loads(target.read_text()) == "new"
    assert link.is_symlink()
    assert len([*target.parent.iterdir(), *link.parent.iterdir()]) == 2


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "-1", "'-1' is not an integer from 0 to 4294967295"),
        ("--seed", "99999999999999999999", "is not an integer from 0 to"),
        ("--image-size", "0", "'0' is not an integer >= 1"),
        ("--image-size", "32,x", "'x' is not an integer >= 1"),
        ("--num-heads", "0", "'0' is not an integer >= 1"),
        ("--layer-norm-eps", "nan", "'nan' is not a number > 0"),
    ],
)
def test_bad_values_of_flags(images, tmp_path, capsys, flag, value, message):
    out = str(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="2"):
        reconstruct.main([str(images), "--checkpoint", "x", "--out", out, f"{flag}={value}"])
    assert message in capsys.readouterr().err


def test_errors_name_the_flag_in_place_of_the_config_key(golden, images, monkeypatch, capsys):
    checkpoint = ["--checkpoint", str(golden / OFFICIAL), "--out", "a.png", "--target", "pixels"]
    command = ["reconstruct", str(images), *checkpoint, "--num-heads", "2"]
    command += ["--decoder-num-heads", "2"]
    for flags, message in (
        (["--mask-ratio", "1.5"], "error: --mask-ratio 1.5 must be within 0 to 1"),
        (["--image-size", "33"], "error: --image-size 33,33 must be a multiple of"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        with pytest.raises(SystemExit, match="2"):
            cli.run_command(reconstruct.main)
        assert message in capsys.readouterr().err


def test_errors_without_a_flag_keep_their_key():
    error = UserError("must be at least 1", key="model.depth", value=0)
    assert error.as_flag(cli.FLAGS) == str(error) == "model.depth=0 must be at least 1"
    assert UserError("no images").as_flag(cli.FLAGS) == "no images"


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
    """Scaled, not clipped at 255; one band of another range is no RGB picture."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    model, _ = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4")
    (pixels,) = model.read_images(tmp_path / "a.png")
    np.testing.assert_allclose(pixels[..., 0], ramp / 257, atol=1)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match=r"b.tiff is bad: its shape is \[32, 32, 1\]"):
        model.read_images(tmp_path / "b.tiff")


def test_no_head(golden, images, heads, tmp_path):
    argv = [str(images), "--checkpoint", str(golden / OFFICIAL), *heads]
    with pytest.raises(ConvertError, match="no classification head.*mae_finetuned_vit_base.pth"):
        predict.main([*argv, "--out", str(tmp_path / "p.csv")])
    assert not (tmp_path / "p.csv").exists()


def test_bad_images_are_an_error_without_output(golden, images, tmp_path):
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


def test_preprocessing_is_the_checkpoints(golden, images):
    """transformers resizes the full image, bilinear; ours and the official code crop, bicubic."""
    with Image.open(images / "4.png") as file:
        picture = file.convert("RGB")
    model, _ = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4")
    squashed = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(model.read_images([images / "4.png"])[0], squashed)
    model, _ = mae_jax.load(golden / OFFICIAL, **HEADS)
    assert picture.size == (54, 40)  # to 32 / 0.875 = 36 rows
    center = picture.resize((48, 36), Image.Resampling.BICUBIC).crop((8, 2, 40, 34))
    np.testing.assert_array_equal(model.read_images([images / "4.png"])[0], center)


def test_image_files_do_not_have_four_channels(golden, tmp_path):
    official = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(
        weights.adapt_input_channels(official, 4), tmp_path / "four.safetensors", "mae_jax"
    )
    model, _ = mae_jax.load(tmp_path / "four.safetensors")
    (tmp_path / "rgb.png").write_bytes(encoded(noise_image(0)))
    with pytest.raises(DataError, match=r"rgb.png is bad: .*image of model.channels=4"):
        model.read_images(tmp_path / "rgb.png")
    kernel = load_file(tmp_path / "four.safetensors")["encoder/patch_embed/kernel"]
    assert kernel.shape == (8 * 8 * 4, 32)


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md"])
def test_the_example_in_the_documentation(golden, page):
    root = Path(__file__).parent.parent
    examples = re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.DOTALL)
    (code,) = [example for example in examples if "picture" in example]
    code = code.replace("runs/demo", str(golden / "hf/hf_tiny/pretrained_v5"))
    names = {}
    exec(code.replace("docs/demo.png", str(root / "docs/demo.png")), names)  # noqa: S102
    assert names["picture"].dtype == np.uint8
    assert names["picture"].shape == names["images"].shape
