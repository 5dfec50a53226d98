"""python -m mae_jax.data as people run it."""

import numpy as np
import pytest
from image_helpers import encoded, fill_folder, photograph
from PIL import Image

from mae_jax.data import __main__ as data
from mae_jax.data.decode import decode
from mae_jax.data.factory import open_source
from mae_jax.data.sources import DataError


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # of the screen: no line is broken


@pytest.fixture
def folder(tmp_path):
    """Splits train and validation of two classes each."""
    for split in ("train", "validation"):
        (tmp_path / "Set A" / split).mkdir(parents=True)
        fill_folder(tmp_path / "Set A" / split)
    return tmp_path / "Set A"


@pytest.fixture
def damaged(folder):
    (folder / "train" / "ant" / "cut.jpg").write_bytes(encoded(photograph(), "JPEG")[:4000])
    (folder / "train" / "ant" / "web.jpg").write_bytes(b"<html>")
    (folder / "train" / "ant" / "nowhere.png").symlink_to(folder / "nowhere.png")
    (folder / "train" / "newt").mkdir()
    return folder


def test_check_of_good_images(folder, capsys):
    data.main(["check", str(folder)])
    out = capsys.readouterr().out
    assert "Set A train" in out
    assert "Set A validation" in out
    assert "2, of 10 to 10 good images" in out
    assert "1 .txt" in out


def test_check_names_what_is_bad_and_why(damaged, tmp_path, capsys, caplog):
    with pytest.raises(SystemExit) as error:
        data.main(["check", str(damaged), "--out", str(tmp_path / "bad.txt")])
    assert error.value.code == 1
    out = capsys.readouterr().out
    assert f"{damaged}/train/ant/cut.jpg: Premature end of JPEG file" in out
    listed = (tmp_path / "bad.txt").read_text().splitlines()
    assert [line.split("\t")[0].rsplit("/")[-1] for line in listed] == ["cut.jpg", "web.jpg"]
    assert "nowhere.png is a link to what does not exist" in caplog.text
    assert "no images in the folders of: newt" in caplog.text


def test_stats_are_those_of_the_pixels(folder, capsys):
    data.main(["stats", str(folder)])
    out = capsys.readouterr().out
    pixels = np.stack([np.asarray(Image.open(f)) for f in (folder / "train").glob("*/[0-9].png")])
    for name, values in (("mean", pixels.mean((0, 1, 2))), ("std", pixels.std((0, 1, 2)))):
        line = next(line for line in out.splitlines() if line.startswith(f"--config.data.{name}="))
        found = [float(x) for x in line.split("(")[1].rstrip(",)'").split(",")]
        np.testing.assert_allclose(found, values / 255, rtol=1e-5)


def test_stats_of_constant_channels_and_bad_images(damaged, tmp_path):
    with pytest.raises(DataError, match="cut.jpg is bad: Premature end"):
        data.main(["stats", str(damaged)])
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat" / "a.npy", np.full((4, 4, 5), 7.0))
    with pytest.raises(DataError, match="channel 0 is 7 everywhere"):
        data.main(["stats", str(tmp_path / "flat"), "--channels", "5", "--split", ""])


def test_cache_is_smaller_and_says_so(folder, tmp_path, caplog, capsys):
    photograph().save(folder / "train" / "ant" / "large.jpg")
    small = encoded(photograph().resize((60, 40)), "JPEG")
    (folder / "train" / "ant" / "small.jpg").write_bytes(small)
    data.main(["cache", str(folder), str(tmp_path / "out"), "--short-side", "64"])
    assert "name=set_a_64" in capsys.readouterr().out
    made = open_source("tfds", "set_a_64", str(tmp_path / "out"), "train")
    assert "set_a_64 is no original: images have a short side of at most 64" in caplog.text
    assert made.classes == ("ant", "zebra")
    assert len(made) == 22
    records = [made[i] for i in range(22)]
    assert sum(record["label"] for record in records) == 10
    assert small in [record["image"] for record in records], "it stays as it is"
    sizes = {decode(record["image"], 3).shape[:2] for record in records}
    assert sizes == {(20, 16), (40, 60), (64, 96)}
    assert len(open_source("tfds", "set_a_64", str(tmp_path / "out"), "validation")) == 20
    with pytest.raises(DataError, match="exists already"):
        data.main(["cache", str(folder), str(tmp_path / "out"), "--short-side", "64"])


def test_cache_leaves_nothing_half_written(damaged, tmp_path, caplog):
    command = ["cache", str(damaged), str(tmp_path / "out"), "--split", "train"]
    with pytest.raises(DataError, match="cut.jpg is bad: .*--skip-bad"):
        data.main(command)
    assert not (tmp_path / "out").exists()
    data.main([*command, "--skip-bad"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set_a_320"]
    assert "left out a bad image" in caplog.text
    assert len(open_source("tfds", "set_a_320", str(tmp_path / "out"), "train")) == 20


def test_splits_that_do_not_exist(folder, tmp_path):
    for command in ("check", "stats"):
        with pytest.raises(DataError, match="Set A/nope does not exist"):
            data.main([command, str(folder), "--split", "nope"])
    (folder / "train").rename(folder / "val")
    with pytest.raises(DataError, match="Set A/train does not exist"):
        data.main(["stats", str(folder)])


def test_prepare(tmp_path, capsys):
    data.main(["prepare", "photo_crops", "--data-dir", str(tmp_path)])
    assert f"name=photo_crops --config.data.path={tmp_path}" in capsys.readouterr().out
    with pytest.raises(DataError, match="is of TFDS: name the data set, and --data-dir"):
        data.main(["check", str(tmp_path)])
    with pytest.raises(DataError, match="knows no data set called 'imagenot'"):
        data.main(["prepare", "imagenot", "--data-dir", str(tmp_path)])


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="/nowhere does not exist"):
        data.main(["check", "/nowhere"])
    with pytest.raises(DataError, match="no data set called 'imagenot'"):
        data.main(["check", "imagenot", "--data-dir", str(tmp_path)])
