"""Sources of records: folders, TFDS data sets of both kinds, arrays."""

import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_helpers import fill_folder, noise_image

from mae_jax.data.decode import decode
from mae_jax.data.factory import open_source
from mae_jax.data.in_memory import ArraySource, InMemory
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.subsets import evenly_spaced, sample_shots
from mae_jax.data.tfds import TfdsSource

TFRECORDS = Path(__file__).parent / "tfrecord"


def records(source):
    return [source[number] for number in range(len(source))]


def expected(what):
    """Label and checksum of every record."""
    return [tuple(pair) for pair in json.loads((TFRECORDS / "expected.json").read_text())[what]]


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path)


class TestFolder:
    def test_classes_are_sorted_folders(self, folder):
        source = FolderSource(str(folder), "train")
        assert len(source) == 20
        assert source.classes == ("ant", "zebra")
        assert source[0]["label"] == 0
        assert source.describe(19) == str(folder / "zebra" / "9.png")

    def test_a_flat_folder_has_no_labels(self, folder):
        source = FolderSource(str(folder / "ant"), "train")
        assert source.classes == ()
        assert source[3]["label"] == -1

    def test_a_subfolder_named_like_the_split_is_read(self, folder):
        (folder / "train").mkdir()
        noise_image(0).save(folder / "train" / "only.png")
        assert len(FolderSource(str(folder), "train")) == 1

    def test_links_are_followed_but_not_in_circles(self, folder):
        (folder / "ant" / "up").symlink_to(folder)
        (folder / "ant" / "linked.png").symlink_to(folder / "zebra" / "1.png")
        (folder / "ant" / "dangling.png").symlink_to(folder / "nowhere.png")
        assert len(FolderSource(str(folder / "ant"), "train")) == 11 + 10

    def test_what_may_have_been_meant_is_named(self, folder, caplog):
        (folder / "ant" / "dangling.png").symlink_to(folder / "nowhere.png")
        (folder / "newt").mkdir()
        source = FolderSource(str(folder), "train")
        assert source.classes == ("ant", "zebra")
        assert "ant/dangling.png is a link to what does not exist" in caplog.text
        assert "no images in the folders of: newt" in caplog.text

    def test_a_file_beside_folders_takes_their_classes(self, folder, caplog):
        noise_image(1).save(folder / "stray.png")
        assert FolderSource(str(folder), "train").classes == ()
        assert "folders count as no classes, since stray.png lies beside them" in caplog.text

    def test_names_of_any_letters(self, folder):
        noise_image(1).save(folder / "ant" / "Ünï 日本 é.PNG")
        (folder / "zebra" / os.fsdecode(b"\xff.png")).write_bytes(b"")
        source = FolderSource(str(folder), "train")
        assert len(source) == 22
        assert source.files == sorted(source.files, key=os.fsencode)
        assert source.fingerprint()
        (folder / "zebra" / "z\nz\x1b[31m.png").write_bytes(b"")
        source = FolderSource(str(folder), "train")
        keys = [source.describe(number) for number in range(len(source))]
        assert all(key.isprintable() for key in keys)
        assert {"z\\nz\\x1b[31m.png", "\\xff.png"} <= {key.split("/")[-1] for key in keys}

    def test_unreadable_files_are_named(self, folder):
        (folder / "ant" / "0.png").unlink()
        (folder / "ant" / "0.png").symlink_to("/proc/self/mem")  # exists, and cannot be read
        (folder / "ant" / "10.png").mkdir()
        os.mkfifo(folder / "ant" / "11.png")  # reading it would wait for ever
        source = FolderSource(str(folder), "train")
        assert len(source) == 20, "a folder is no image, nor is a pipe"
        with pytest.raises(DataError, match="it cannot be read: Input/output error"):
            source[0]

    def test_fingerprint_sees_added_and_resized_files(self, folder):
        before = FolderSource(str(folder), "train").fingerprint()
        assert FolderSource(str(folder), "train").fingerprint() == before
        noise_image(0, (30, 30)).save(folder / "ant" / "0.png")
        resized = FolderSource(str(folder), "train").fingerprint()
        noise_image(0).save(folder / "ant" / "new.png")
        assert len({before, resized, FolderSource(str(folder), "train").fingerprint()}) == 3

    def test_missing_and_empty_folders_are_named(self, tmp_path):
        with pytest.raises(DataError, match="nowhere"):
            FolderSource(str(tmp_path / "nowhere"), "train")
        with pytest.raises(DataError, match=f"no images in {tmp_path}"):
            FolderSource(str(tmp_path), "train")

    def test_subset_is_evenly_spaced(self, folder):
        source = FolderSource(str(folder), "train")
        subset = evenly_spaced(source, 3)
        assert [subset.describe(i) for i in range(3)] == [source.describe(i) for i in (0, 10, 19)]
        assert len(evenly_spaced(source, 1000)) == 20


class TestTfds:
    def test_embedded_data_set(self, photo_crops):
        train, test = (TfdsSource("photo_crops", s, photo_crops) for s in ("train", "test"))
        assert len(train) == 19 * 400
        assert len(test) == 19 * 80
        assert len(train.classes) == 19
        labels = [train[i]["label"] for i in range(0, len(train), 40)]
        assert set(labels) == set(range(19)), "array_record is shuffled and labelled"
        assert min(decode(train[0]["image"], 3).shape[:2]) >= 64
        assert train.fingerprint() != test.fingerprint()
        assert TfdsSource("photo_crops", "train[:50%]", photo_crops).__len__() == 19 * 200

    def test_tensorflow_is_not_imported(self, photo_crops):
        import sys

        TfdsSource("photo_crops", "test", photo_crops)[0]
        assert "tensorflow" not in sys.modules

    def test_train_and_test_crops_do_not_share_pixels(self):
        from mae_jax.data import demo_dataset

        image = demo_dataset.photograph("cat")
        border = round(image.width * demo_dataset.TRAIN_SHARE)
        assert demo_dataset.crops("cat", "train")[0].tobytes()
        for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
            strip = np.asarray(image)[:, left:right]
            colours = {tuple(pixel) for pixel in strip.reshape(-1, 3)}
            for crop in demo_dataset.crops("cat", split)[:20]:
                assert {tuple(p) for p in np.asarray(crop).reshape(-1, 3)} <= colours

    def test_unknown_names_and_splits(self, photo_crops, tmp_path):
        with pytest.raises(DataError, match="no split 'val'; it has train, test"):
            TfdsSource("photo_crops", "val", photo_crops)
        with pytest.raises(DataError, match=r"the split 'test\[:0\]' of photo_crops is empty"):
            TfdsSource("photo_crops", "test[:0]", photo_crops)
        with pytest.raises(DataError, match=r"'test\[:x\]' is no split of photo_crops"):
            TfdsSource("photo_crops", "test[:x]", photo_crops)
        with pytest.raises(DataError, match="knows no data set called 'imagenot'"):
            TfdsSource("imagenot", "train", str(tmp_path))
        with pytest.raises(DataError, match="cifar10 is not prepared in"):
            TfdsSource("cifar10", "train", str(tmp_path))
        with pytest.raises(DataError, match="data.source='web'"):
            open_source("web", None, None, "train")


class TestTfRecords:
    """Files that TensorFlow wrote, against what TensorFlow reads from them."""

    @pytest.mark.parametrize("split", ["train", "train[3:10]", "test"])
    def test_is_what_tensorflow_reads(self, split):
        source = TfdsSource("tiny_set", split, str(TFRECORDS))
        found = [(record["label"], zlib.crc32(record["image"])) for record in records(source)]
        assert found == expected(f"tiny_set {split}")
        assert source.classes == ("a", "b", "c")
        assert decode(source[0]["image"], 3).shape[1:] == (9, 3)

    def test_a_feature_of_many_channels(self):
        source = TfdsSource("many_bands", "train[2:]", str(TFRECORDS), image="bands")
        found = [(r["label"], zlib.crc32(r["image"].tobytes())) for r in records(source)]
        assert found == expected("many_bands train[2:]")
        assert decode(source[0]["image"], 5).shape == (6, 6, 5)
        with pytest.raises(DataError, match="no feature called 'image', only .*bands.*: data.im"):
            TfdsSource("many_bands", "train", str(TFRECORDS))

    def test_files_are_indexed_once(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            for _ in range(2):
                source = TfdsSource("tiny_set", "train", str(TFRECORDS), index_dir=tmp_path / "i")
                assert len(records(source)) == 14
        assert caplog.text.count("looking for where records begin in TFRecord files: 3") == 1
        assert [path.name[:9] for path in (tmp_path / "i").iterdir()] == ["tiny_set-"]

    def test_a_file_that_was_written_anew_is_indexed_anew(self, tmp_path):
        shutil.copytree(TFRECORDS / "tiny_set", tmp_path / "tiny_set")
        index = tmp_path / "index"
        for age in (1, 2):
            for file in (tmp_path / "tiny_set" / "1.2.0").glob("*.tfrecord*"):
                os.utime(file, (age, age))
            TfdsSource("tiny_set", "train", str(tmp_path), index_dir=index)
        assert len(list(index.iterdir())) == 2

    def test_an_index_that_cannot_be_kept_stops_nobody(self, tmp_path, caplog):
        (tmp_path / "index").write_text("a file")
        source = TfdsSource("tiny_set", "train", str(TFRECORDS), index_dir=tmp_path / "index")
        assert len(records(source)) == 14
        assert "the index could not be kept" in caplog.text

    def test_sums_of_splits(self):
        source = TfdsSource("tiny_set", "train[:3]+test", str(TFRECORDS))
        found = [(record["label"], zlib.crc32(record["image"])) for record in records(source)]
        assert found == expected("tiny_set train")[:3] + expected("tiny_set test")

    def test_a_record_that_cannot_be_parsed_is_an_error_of_data(self, tmp_path):
        shutil.copytree(TFRECORDS / "tiny_set", tmp_path / "tiny_set")
        file = tmp_path / "tiny_set" / "1.2.0" / "tiny_set-train.tfrecord-00000-of-00003"
        data = bytearray(file.read_bytes())
        data[12:20] = b"\xff" * 8
        file.write_bytes(data)
        source = TfdsSource("tiny_set", "train", str(tmp_path))
        with pytest.raises(DataError, match="its record cannot be read"):
            source[0]

    def test_damaged_files_are_named(self, tmp_path):
        shutil.copytree(TFRECORDS / "tiny_set", tmp_path / "tiny_set")
        file = tmp_path / "tiny_set" / "1.2.0" / "tiny_set-train.tfrecord-00001-of-00003"
        data = file.read_bytes()
        source = TfdsSource("tiny_set", "train", str(tmp_path))
        file.write_bytes(data[:-1])
        with pytest.raises(DataError, match="00001-of-00003 is cut off.* at record"):
            TfdsSource("tiny_set", "train", str(tmp_path))
        file.write_bytes(data[:100])
        with pytest.raises(DataError, match="00001-of-00003 has been cut off since"):
            records(source)
        file.write_bytes(b"")
        with pytest.raises(DataError, match="00001-of-00003 has 0 records, but"):
            TfdsSource("tiny_set", "train", str(tmp_path))
        file.unlink()
        with pytest.raises(DataError, match="00001-of-00003 does not exist"):
            TfdsSource("tiny_set", "train", str(tmp_path))


class TestArrays:
    def arrays(self, count=6):
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (count, 8, 9, 3), dtype=np.uint8), np.arange(count) % 3

    def test_files_of_arrays(self, tmp_path):
        images, labels = self.arrays()
        np.savez(tmp_path / "train.npz", image=images, label=labels, classes=["x", "y", "z"])
        np.savez(tmp_path / "validation.npz", image=images, label=labels)
        np.save(tmp_path / "test.npy", images)
        source = open_source("arrays", None, str(tmp_path), "train")
        assert source.classes == ("x", "y", "z")
        np.testing.assert_array_equal(source[4]["image"], images[4])
        assert source[4]["label"] == source.label(4) == 1
        assert source.describe(4) == f"image 4 of {tmp_path}/train.npz"
        judged = open_source("arrays", None, str(tmp_path), "validation", source.classes)
        assert judged.classes == source.classes
        bare = open_source("arrays", None, str(tmp_path), "test")
        assert bare.classes == ()
        assert bare.label(0) == -1

    def test_fingerprint_is_of_the_values(self):
        images, labels = self.arrays()
        before = ArraySource("a", images, labels).fingerprint()
        assert ArraySource("b", images, labels).fingerprint() == before
        images[2, 3, 4, 0] ^= 1
        assert ArraySource("a", images, labels).fingerprint() != before

    def test_what_is_wrong_is_named(self, tmp_path):
        images, labels = self.arrays()
        with pytest.raises(DataError, match="neither .*train.npz nor train.npy exists"):
            open_source("arrays", None, str(tmp_path), "train")
        np.savez(tmp_path / "a.npz", image=images, label=labels[:4])
        with pytest.raises(DataError, match=r"a.npz has 6 images and labels of shape \[4\]"):
            open_source("arrays", None, str(tmp_path), "a")
        np.savez(tmp_path / "b.npz", images=images)
        with pytest.raises(DataError, match="b.npz: its array 'image' .* is missing"):
            open_source("arrays", None, str(tmp_path), "b")
        np.savez(tmp_path / "d.npz", image=images, label=labels, classes=["x", "y", "z"])
        with pytest.raises(DataError, match="d.npz: its classes are x, y, z, those of training z"):
            open_source("arrays", None, str(tmp_path), "d", ("z", "y", "x"))
        np.savez(tmp_path / "e.npz", image=images, label=np.array(list("xyzxyz")))
        with pytest.raises(DataError, match="e.npz: its array 'label' is of <U1, not of class n"):
            open_source("arrays", None, str(tmp_path), "e")
        np.savez(tmp_path / "f.npz", image=images, label=labels, classes=["x"])
        with pytest.raises(DataError, match="f.npz has labels from 0 to 2 for 1 classes"):
            open_source("arrays", None, str(tmp_path), "f")
        (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
        with pytest.raises(DataError, match="c.npz cannot be read"):
            open_source("arrays", None, str(tmp_path), "c")
        with pytest.raises(DataError, match="data.source='arrays' needs data.path"):
            open_source("arrays", None, None, "train")

    def test_in_memory_is_the_same_but_decoded(self, folder):
        (folder / "ant" / "3.png").write_bytes(b"")
        source = FolderSource(str(folder), "train")
        held = InMemory(source, 3)
        assert held.fingerprint() == source.fingerprint()
        assert (len(held), held.classes) == (len(source), source.classes)
        for number in range(len(source)):
            assert held.describe(number) == source.describe(number)
            assert held.label(number) == source.label(number)
            if number != 3:
                pixels = decode(source[number]["image"], 3)
                np.testing.assert_array_equal(held[number]["image"], pixels)
        assert held[3]["image"] == b"", "for whoever reads it to say so"


def test_shots_are_drawn_of_classes_only():
    labels = [-1, 0, 1, 5, 0, 1, -1, 1]
    drawn = sample_shots(labels.__getitem__, 8, ("a", "b"), 2, seed=0)
    assert sorted(labels[number] for number in drawn) == [0, 0, 1, 1]
    with pytest.raises(DataError, match="3 shots, but class 'a' has only 2 images"):
        sample_shots(labels.__getitem__, 8, ("a", "b"), 3, seed=0)
