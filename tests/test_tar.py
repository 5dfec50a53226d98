"""Tar files of images (WebDataset), read by index."""

import json
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from image_helpers import encoded, fill_folder, noise_image, saved
from source_helpers import assert_same_as_folder, write_shards, write_tar

from mae_jax.data import __main__ as data
from mae_jax.data import tar
from mae_jax.data.factory import DatasetSpec, detect_dataset
from mae_jax.data.loader import ExampleLoader
from mae_jax.data.shard_files import expand_braces
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.tar import TARS, TarSource
from mae_jax.data.transforms import EvalTransform

PICTURE = encoded(noise_image(0))


@pytest.fixture
def folder(tmp_path):
    """A folder of images with the splits train and validation."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        fill_folder(tmp_path / "images" / split)
    return tmp_path / "images"


@pytest.fixture
def shards(folder, tmp_path):
    """The same images in shards of both splits."""
    for split in ("train", "validation"):
        source = FolderSource(str(folder), split)
        write_shards(source, tmp_path / "shards", f"tiny-{split}")
    return tmp_path / "shards"


@pytest.mark.parametrize("where", ["", "tiny-{split}-{000..002}.tar", "tiny-{split}-*.tar"])
def test_batches_are_those_of_the_folder(folder, shards, tmp_path, where):
    index_dir = tmp_path / "indices"
    assert_same_as_folder(folder, index_dir, source="tar", path=str(shards / where))


def test_the_index_is_cached_until_a_shard_changes(shards, tmp_path, monkeypatch, caplog):
    spec = DatasetSpec("tar", path=str(shards), index_dir=tmp_path / "indices")
    source = spec.open("train")
    assert [file.suffix for file in (tmp_path / "indices").iterdir()] == [".npz"]
    indexed = []
    index_tar = tar._index_tar
    monkeypatch.setattr(tar, "_index_tar", lambda *a: indexed.append(a[0]) or index_tar(*a))
    again = spec.open("train")
    assert not indexed
    assert again.fingerprint() == source.fingerprint()
    assert again.classes == ("0", "1")
    [cached] = (tmp_path / "indices").iterdir()
    cached.write_bytes(cached.read_bytes()[:-9])
    assert spec.open("train").fingerprint() == source.fingerprint()
    assert f"{cached} is damaged, and made again" in caplog.text
    copy = pickle.loads(pickle.dumps(again))
    assert copy[7] == source[7]
    first = write_tar(shards / "tiny-train-000.tar", {"a.png": PICTURE, "a.cls": "1"})
    with pytest.raises(DataError, match="tiny-train-000.tar has changed since it was indexed"):
        _ = source[0]
    changed = spec.open("train")
    assert first in indexed
    assert changed.fingerprint() != source.fingerprint()


def test_labels(tmp_path):
    def labels(**suffixes):
        members = {"b/1.png": PICTURE, "a.png": PICTURE}
        for suffix, values in suffixes.items():
            members |= {f"{name}.{suffix}": value for name, value in zip(("b/1", "a"), values)}
        source = TarSource([write_tar(tmp_path / "x.tar", members)])
        return [source.label(index) for index in range(2)], source.classes

    numbers = ("0", "1", "2", "3")
    assert labels() == ([-1, -1], ())
    assert labels(cls=("3", " 1\n")) == ([3, 1], numbers)
    assert labels(json=('{"label": 3, "width": 9}', '{"cls": 0}')) == ([3, 0], numbers)
    assert labels(json=('{"label": true}', '{"label": "cat"}')) == ([-1, -1], ())
    assert labels(json=("[0]", "{")) == ([-1, -1], ())
    assert labels(txt=("3", "2")) == ([3, 2], numbers)
    assert labels(txt=("a photo of 3 cats", "2")) == ([-1, -1], ())
    assert labels(txt=("2", "a cat")) == ([-1, -1], ())
    assert labels(txt=("20180912345678901234", "9" * 5000)) == ([-1, -1], ())
    assert labels(json=('{"label": null}', '{"label": 3}')) == ([-1, 3], numbers)
    assert labels(json=('{"label": 1000000000000000000000}', "[" * 10**5)) == ([-1, -1], ())
    assert labels(txt=("0", "0"), json=('{"label": 1}', '{"label": 1}'), cls="32")[0] == [3, 2]
    with pytest.raises(DataError, match=r"x.tar: a.cls is 'cat', but .cls has the number"):
        labels(cls=("1", "cat"))
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert labels(cls=("0", "1")) == ([0, 1], ("ant", "bee"))
    with pytest.raises(DataError, match=r"x.tar/a.png has label 2, but there are 2 classes: name"):
        labels(cls=("0", "2"))


def test_samples_of_several_members(tmp_path):
    def read(members, image="image"):
        source = TarSource([write_tar(tmp_path / "x.tar", members)], image=image)
        return [source[index]["image"] for index in range(len(source))]

    other, array = encoded(noise_image(1)), saved(np.zeros((4, 4, 3), np.uint8))
    assert read({"a.json": "{}", "a.txt": "a cat", "a.jpg": PICTURE}) == [PICTURE]
    assert read({"a.npy": array, "b.webp": other, "B.PNG": PICTURE}) == [array, other, PICTURE]
    assert read({"a.seg.png": other, "a.png": PICTURE, "b.left.png": other}) == [PICTURE, other]
    assert read({"1.png": PICTURE, "2.cls": "0", "2.png": other, "1.cls": "1"}) == [PICTURE, other]
    two = {"a.left.png": other, "a.right.png": PICTURE}
    with pytest.raises(DataError, match=r"two images of one sample, a.left.png and a.right.png"):
        read(two)
    assert read(two, "right.png") == [PICTURE]
    path = write_tar(tmp_path / "twice.tar", {"a.png": other})
    with tarfile.open(path, "a") as file:
        file.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="twice.tar has two members a.png"):
        TarSource([path])
    hidden = {"./d/._a.png": other, "./d/a.png": PICTURE, "./.b.png": other}
    assert read(hidden) == [PICTURE]


def test_links_and_sparse_files_are_logged(tmp_path, caplog):
    (tmp_path / "holes.npy").write_bytes(saved(np.ones((4, 4, 3))))
    with (tmp_path / "holes.npy").open("r+b") as file:
        file.truncate(10**6)
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    names = ["a.png", "b.png", "holes.npy"]
    path = tmp_path / "x.tar"
    subprocess.run(["tar", "-S", "-C", str(tmp_path), "-cf", str(path), *names], check=True)
    source = TarSource([path])
    assert [source.describe(index) for index in range(len(source))] == [f"{path}/a.png"]
    assert "ignored: 2 links or sparse files of" in caplog.text
    assert "x.tar, as b.png" in caplog.text


def test_names(tmp_path):
    long = "räume/" + "x" * 150 + "/" + "y" * 120
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        members = {"0.png": PICTURE, f"{long}.png": PICTURE, f"{long}.cls": "0"}
        source = TarSource([write_tar(tmp_path / "x.tar", members, format=kind)])
        assert source.describe(1) == f"{tmp_path}/x.tar/{long}.png"
        assert source[1] == {"image": PICTURE, "label": 0}
    bad = TarSource([write_tar(tmp_path / "x.tar", {"0.png": PICTURE[:100]})])
    with pytest.raises(DataError, match=r"x.tar/0.png is bad"):
        ExampleLoader(bad, EvalTransform((16, 16), 3))(0)


def test_damaged_and_other_files(tmp_path, caplog):
    whole = write_tar(tmp_path / "x.tar", {"a.png": PICTURE, "b.png": PICTURE}).read_bytes()
    path = tmp_path / "x.tar"

    def error_of(content):
        path.write_bytes(content)
        with pytest.raises(DataError) as error:
            TarSource([path])
        return str(error.value)

    length = whole.index(b"b.png")
    assert f"{path} is cut off within b.png" in error_of(whole[: length + 700])
    assert f"{path} is damaged or cut off at byte {length}" in error_of(whole[: length + 100])
    garbled = whole[:length] + b"?" * 512 + whole[length + 512 :]
    assert f"{path} is damaged or cut off at byte {length}" in error_of(garbled)
    assert f"{path} is damaged, cut off, or not a tar file" in error_of(b"<html>" * 200)
    assert f"{path} is empty" in error_of(b"")
    assert "no images in" in error_of(bytes(10240))
    zeroed = whole[:length] + bytes(1024) + whole[length + 1024 :]
    assert f"{path} goes on after an end mark at byte {length}" in error_of(zeroed)
    path.write_bytes(whole[:length])
    assert len(TarSource([path])) == 1
    assert "x.tar has no end mark" in caplog.text
    with pytest.raises(DataError, match="y.tar does not exist"):
        TarSource([path, tmp_path / "y.tar"])


def test_compressed_files_are_refused_with_the_command_that_unpacks_them(tmp_path):
    path = write_tar(tmp_path / "my x.tar", {"a.png": PICTURE})
    subprocess.run(["gzip", str(path)], check=True)
    with pytest.raises(DataError, match="my x.tar.gz is compressed") as error:
        detect_dataset(f"{path}.gz", None).open("")
    command = str(error.value).split("unpack it with ")[1]
    subprocess.run(command, shell=True, check=True)
    assert len(TarSource([path])) == 1


def test_patterns(tmp_path):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    for name in ("in-train-0.tar", "in-train-1.tar", "in-validation-0.tar"):
        (tmp_path / name).touch()
    names = lambda *a: [file.name for file in TARS.find(*a)]
    assert names(str(tmp_path), "train") == ["in-train-0.tar", "in-train-1.tar"]
    assert names(f"{tmp_path}/in-{{split}}-{{0..1}}.tar", "train") == names(str(tmp_path), "train")
    with pytest.raises(DataError, match="no tar files of any usual split: x-{split}"):
        TARS.find("x-{split}-0.tar", "")
    odd = tmp_path / "odd [1]"
    odd.mkdir()
    (odd / "0.tar").touch()
    assert names(f"{odd}/?.tar", "train") == ["0.tar"]
    with pytest.raises(DataError, match="no tar files of the split 'test'"):
        TARS.find(str(tmp_path), "test")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.tar").touch()
    assert names(str(tmp_path), "test") == ["0.tar"]
    with pytest.raises(DataError, match="does not exist"):
        TARS.find(str(tmp_path / "nothing"), "train")


def test_commands_detect_tar_files(shards, tmp_path, capsys):
    assert detect_dataset(str(shards), None).splits() == ["train", "validation"]
    data.main(["check", str(shards)])
    assert "2, with 10 to 10 good images" in capsys.readouterr().out
    path = write_tar(tmp_path / "shards" / "more.tar", {"a.png": PICTURE})
    assert len(detect_dataset(str(path), None).open("")) == 1
    alone = tmp_path / "alone"
    alone.mkdir()
    path.rename(alone / "0.tar")
    (alone / "stats.json").write_text(json.dumps({}))
    assert isinstance(detect_dataset(str(alone), None).open(""), TarSource)
    noise_image(0).save(alone / "a.png")
    assert isinstance(detect_dataset(str(alone), None).open(""), FolderSource)
