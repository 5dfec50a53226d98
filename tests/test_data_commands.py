"""The commands of python -m mae_jax.data."""

import numpy as np
import pytest
import tifffile
from image_helpers import encoded, fill_folder, photograph
from PIL import Image

from mae_jax.data import __main__ as data
from mae_jax.data.decode import decode
from mae_jax.data.factory import DatasetSpec
from mae_jax.data.sources import DataError


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # so that no line is wrapped


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the splits train and validation, of two classes each."""
    for split in ("train", "validation"):
        (tmp_path / "Set A" / split).mkdir(parents=True)
        fill_folder(tmp_path / "Set A" / split)
    return tmp_path / "Set A"


@pytest.fixture
def corrupt(folder):
    """Add two bad images, a broken symlink and an empty class folder to the training split."""
    (folder / "train" / "ant" / "cut.jpg").write_bytes(encoded(photograph(), "JPEG")[:4000])
    (folder / "train" / "ant" / "web.jpg").write_bytes(b"<html>")
    (folder / "train" / "ant" / "missing.png").symlink_to(folder / "missing.png")
    (folder / "train" / "newt").mkdir()
    return folder


def test_check_summarizes_splits(folder, capsys):
    data.main(["check", str(folder)])
    out = capsys.readouterr().out
    assert "Set A train" in out
    assert "Set A validation" in out
    assert "2, with 10 to 10 good images" in out
    assert "1 .txt" in out


def test_check_lists_bad_images_with_the_reason(corrupt, tmp_path, capsys, caplog):
    with pytest.raises(SystemExit) as error:
        data.main(["check", str(corrupt), "--out", str(tmp_path / "bad.txt")])
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert f"{corrupt}/train/ant/cut.jpg: Premature end of JPEG file" in out
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.split("\t")[0].rsplit("/")[-1] for line in listed] == ["cut.jpg", "web.jpg"]
    assert "missing.png is a broken symlink" in caplog.text
    assert "no images in the folders of: newt" in caplog.text


def test_stats_equal_mean_and_std_of_the_pixels(folder, capsys):
    data.main(["stats", str(folder)])
    out = capsys.readouterr().out
    pixels = np.stack([np.asarray(Image.open(f)) for f in (folder / "train").glob("*/[0-9].png")])
    for name, values in (("mean", pixels.mean((0, 1, 2))), ("std", pixels.std((0, 1, 2)))):
        line = next(line for line in out.splitlines() if line.startswith(f"--config.data.{name}="))
        printed = [float(x) for x in line.split("(")[1].rstrip(",)'").split(",")]
        np.testing.assert_allclose(printed, values / 255, rtol=1e-5)


def test_stats_rejects_bad_images_and_constant_channels(corrupt, tmp_path):
    with pytest.raises(DataError, match="cut.jpg is bad: Premature end"):
        data.main(["stats", str(corrupt)])
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat" / "a.npy", np.full((4, 4, 5), 7.0))
    with pytest.raises(DataError, match=r"channel 0 is constant \(7\): remove it"):
        data.main(["stats", str(tmp_path / "flat"), "--channels", "5", "--split", ""])


def test_cache_downscales_and_marks_the_copy(folder, tmp_path, caplog, capsys):
    photograph().save(folder / "train" / "ant" / "large.jpg")
    small = encoded(photograph().resize((60, 40)), "JPEG")
    (folder / "train" / "ant" / "small.jpg").write_bytes(small)
    data.main(["cache", str(folder), str(tmp_path / "out"), "--short-side", "64"])
    assert "name=set_a_64" in capsys.readouterr().out
    dataset = DatasetSpec("tfds", "set_a_64", str(tmp_path / "out"))
    copy = dataset.open("train")
    assert (
        "set_a_64 differs from the original dataset: images have a short side of at most 64"
        in caplog.text
    )
    assert copy.classes == ("ant", "zebra")
    assert len(copy) == 22
    records = [copy[i] for i in range(22)]
    assert sum(record["label"] for record in records) == 10
    assert small in [record["image"] for record in records], "small JPEGs are copied unchanged"
    sizes = {decode(record["image"], 3).shape[:2] for record in records}
    assert sizes == {(20, 16), (40, 60), (64, 96)}
    assert len(dataset.open("validation")) == 20
    with pytest.raises(DataError, match="set_a_64/1.0.0 exists: remove it"):
        data.main(["cache", str(folder), str(tmp_path / "out"), "--short-side", "64"])


@pytest.mark.parametrize("inside", ["", "copy", "train/copy"])
def test_a_copy_among_the_images_is_refused(folder, inside):
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match="would be among the images of"):
        data.main(["cache", str(folder), str(folder / inside)])
    assert sorted(folder.rglob("*")) == before


def test_failed_cache_leaves_no_partial_output(corrupt, tmp_path, caplog):
    command = ["cache", str(corrupt), str(tmp_path / "out"), "--split", "train"]
    with pytest.raises(DataError, match="cut.jpg is bad: .*--skip-bad"):
        data.main(command)
    assert not (tmp_path / "out").exists()
    data.main([*command, "--skip-bad"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set_a_320"]
    assert "left out a bad image" in caplog.text
    assert len(DatasetSpec("tfds", "set_a_320", str(tmp_path / "out")).open("train")) == 20


def test_missing_splits(folder, tmp_path):
    for command in ("check", "stats"):
        with pytest.raises(DataError, match="Set A/nope does not exist"):
            data.main([command, str(folder), "--split", "nope"])
    (folder / "train").rename(folder / "val")
    with pytest.raises(DataError, match="Set A/train does not exist"):
        data.main(["stats", str(folder)])


def test_prepare(photo_crops, tmp_path, capsys):
    data.main(["prepare", "photo_crops", "--data-dir", photo_crops])
    assert f"name=photo_crops --config.data.path={photo_crops}" in capsys.readouterr().out
    with pytest.raises(DataError, match="is a TFDS directory: give the name of the dataset"):
        data.main(["check", photo_crops])
    with pytest.raises(DataError, match="no dataset 'imagenot': TFDS does not know it"):
        data.main(["prepare", "imagenot", "--data-dir", str(tmp_path)])


def test_missing_folder_and_unknown_dataset(tmp_path):
    with pytest.raises(DataError, match="/nowhere does not exist"):
        data.main(["check", "/nowhere"])
    with pytest.raises(DataError, match="no dataset 'imagenot'"):
        data.main(["check", "imagenot", "--data-dir", str(tmp_path)])


def test_images_of_several_dtypes_are_named(folder, capsys):
    tifffile.imwrite(
        folder / "train" / "ant" / "zz.tif",
        np.zeros((8, 8, 3), np.float32),
        photometric="minisblack",
        planarconfig="contig",
    )
    data.main(["check", str(folder), "--split", "train"])
    assert "float32: 1; training needs images of one dtype" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"zz.tif is float32, but .* is uint8: all images must"):
        data.main(["stats", str(folder), "--split", "train"])
