"""Sources of records: folders, array files, in-memory images and subsets."""

import os

import numpy as np
import pytest
from image_helpers import fill_folder, noise_image

from mae_jax.data.decode import decode
from mae_jax.data.factory import DatasetSpec
from mae_jax.data.in_memory import ArraySource, InMemory
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.subsets import evenly_spaced, sample_shots


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path)


class TestFolderSource:
    def test_subfolders_are_classes_in_sorted_order(self, folder):
        source = FolderSource(str(folder), "train")
        assert len(source) == 20
        assert source.classes == ("ant", "zebra")
        assert source[0]["label"] == source.label(0) == 0
        assert source[19]["label"] == source.label(19) == 1
        assert source.describe(19) == str(folder / "zebra" / "9.png")

    def test_flat_folder_has_no_labels(self, folder):
        source = FolderSource(str(folder / "ant"), "train")
        assert source.classes == ()
        assert source[3]["label"] == -1

    def test_subfolder_of_the_split_is_read(self, folder):
        (folder / "train").mkdir()
        noise_image(0).save(folder / "train" / "only.png")
        assert len(FolderSource(str(folder), "train")) == 1

    def test_symlinks_are_followed_except_in_cycles(self, folder):
        (folder / "ant" / "up").symlink_to(folder)
        (folder / "ant" / "linked.png").symlink_to(folder / "zebra" / "1.png")
        assert len(FolderSource(str(folder / "ant"), "train")) == 11 + 10

    def test_ignored_files_and_folders_are_logged(self, folder, caplog):
        for number in range(7):
            (folder / "ant" / f"broken{number}.png").symlink_to(folder / "missing.png")
        (folder / "newt").mkdir()
        source = FolderSource(str(folder), "train")
        assert source.classes == ("ant", "zebra")
        assert len(source) == 20
        assert caplog.text.count(".png is a broken symlink") == 5
        assert "ignored: 2 more broken symlinks" in caplog.text
        assert "no images in the folders of: newt" in caplog.text

    def test_image_next_to_class_folders_disables_labels(self, folder, caplog):
        noise_image(1).save(folder / "stray.png")
        source = FolderSource(str(folder), "train")
        assert source.classes == ()
        assert {source.label(index) for index in range(len(source))} == {-1}
        assert "no class labels: stray.png is next to the class folders" in caplog.text

    def test_classes_of_the_training_split_are_used(self, folder):
        source = FolderSource(str(folder), "val", ("zebra", "ant", "newt"))
        assert source.classes == ("zebra", "ant", "newt")
        assert (source.label(0), source.label(19)) == (1, 0)
        with pytest.raises(DataError, match="not in the training split: zebra; training has ant"):
            FolderSource(str(folder), "val", ("ant",))

    def test_unicode_and_undecodable_names(self, folder):
        noise_image(1).save(folder / "ant" / "Ünï 日本 é.PNG")
        (folder / "zebra" / os.fsdecode(b"\xff.png")).write_bytes(b"")
        (folder / "zebra" / "z\nz\x1b[31m.png").write_bytes(b"")
        source = FolderSource(str(folder), "train")
        assert len(source) == 23
        assert source.files == sorted(source.files, key=os.fsencode)
        assert source.fingerprint()
        names = [source.describe(index) for index in range(len(source))]
        assert all(name.isprintable() for name in names)
        assert {"z\\nz\\x1b[31m.png", "\\xff.png"} <= {name.split("/")[-1] for name in names}

    def test_unreadable_file_is_a_data_error(self, folder):
        (folder / "ant" / "0.png").unlink()
        (folder / "ant" / "0.png").symlink_to("/proc/self/mem")  # exists, but reading it fails
        (folder / "ant" / "10.png").mkdir()
        os.mkfifo(folder / "ant" / "11.png")  # reading it would block
        source = FolderSource(str(folder), "train")
        assert len(source) == 20, "neither a folder nor a pipe is an image"
        with pytest.raises(DataError, match="it cannot be read: Input/output error"):
            source[0]

    def test_fingerprint_changes_with_added_and_resized_files(self, folder):
        fingerprint = lambda: FolderSource(str(folder), "train").fingerprint()
        before = fingerprint()
        assert fingerprint() == before
        noise_image(0, (30, 30)).save(folder / "ant" / "0.png")
        resized = fingerprint()
        noise_image(0).save(folder / "ant" / "new.png")
        assert len({before, resized, fingerprint()}) == 3

    def test_missing_and_empty_folders(self, tmp_path):
        with pytest.raises(DataError, match=r"data\.path='.*missing' does not exist") as error:
            FolderSource(str(tmp_path / "missing"), "train")
        assert error.value.key == "data.path"
        with pytest.raises(DataError, match=f"no images in {tmp_path}"):
            FolderSource(str(tmp_path), "train")

    def test_evenly_spaced_subset(self, folder):
        source = FolderSource(str(folder), "train")
        subset = evenly_spaced(source, 3)
        for index, original in enumerate((0, 10, 19)):
            assert subset.describe(index) == source.describe(original)
            assert subset.label(index) == source.label(original)
        assert len(evenly_spaced(source, 1000)) == 20


class TestArrayFiles:
    RNG = np.random.default_rng(0)
    IMAGES = RNG.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
    LABELS = np.arange(6) % 3

    def test_npz_and_npy(self, tmp_path):
        dataset = DatasetSpec("arrays", path=str(tmp_path))
        np.savez(
            tmp_path / "train.npz", image=self.IMAGES, label=self.LABELS, classes=["x", "y", "z"]
        )
        np.savez(tmp_path / "validation.npz", image=self.IMAGES, label=self.LABELS)
        np.save(tmp_path / "test.npy", self.IMAGES)
        train = dataset.open("train")
        assert train.classes == ("x", "y", "z")
        np.testing.assert_array_equal(train[4]["image"], self.IMAGES[4])
        assert train[4]["label"] == train.label(4) == 1
        assert train.describe(4) == f"image 4 of {tmp_path}/train.npz"
        assert dataset.open("validation").classes == ("0", "1", "2")
        assert dataset.open("validation", train.classes).classes == train.classes
        test = dataset.open("test")
        assert test.classes == ()
        assert test.label(0) == -1

    def test_fingerprint_depends_on_values_only(self):
        images = self.IMAGES.copy()
        before = ArraySource("a", images, self.LABELS).fingerprint()
        assert ArraySource("b", images, self.LABELS).fingerprint() == before
        images[2, 3, 4, 0] ^= 1
        assert ArraySource("a", images, self.LABELS).fingerprint() != before

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            (dict(image=IMAGES, label=LABELS[:4]), r"has 6 images, but labels of shape \[4\]"),
            (
                dict(images=IMAGES),
                r"a.npz: array 'image' \[n, height, width, channels\] is missing",
            ),
            (dict(image=IMAGES[0, 0]), r"a.npz: array 'image' .* has shape \[9, 3\]"),
            (dict(image=IMAGES[:0]), "a.npz has no images"),
            (
                dict(image=IMAGES, label=LABELS, classes=["x", "y", "z"]),
                "a.npz has the classes x, y, z, but training has z, y, x",
            ),
            (
                dict(image=IMAGES, label=np.array(list("xyzxyz"))),
                "a.npz: array 'label' has dtype <U1, not an integer type",
            ),
            (dict(image=IMAGES, label=LABELS + 1), "a.npz has labels from 1 to 3 for 3 classes"),
        ],
    )
    def test_invalid_arrays(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=message):
            DatasetSpec("arrays", path=str(tmp_path)).open("a", ("z", "y", "x"))

    def test_missing_file_path_and_kind(self, tmp_path):
        dataset = DatasetSpec("arrays", path=str(tmp_path))
        with pytest.raises(DataError, match="neither .*train.npz nor train.npy exists"):
            dataset.open("train")
        np.savez(tmp_path / "a.npz", image=self.IMAGES)
        (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-40])
        with pytest.raises(DataError, match="b.npz cannot be read"):
            dataset.open("b")
        with pytest.raises(DataError, match="data.source='arrays' needs data.path"):
            DatasetSpec("arrays").open("train")
        with pytest.raises(DataError, match="data.source='web' must be one of tfds, folder"):
            DatasetSpec("web").open("train")


def test_in_memory_source_equals_its_source_decoded(folder):
    (folder / "ant" / "3.png").write_bytes(b"")
    source = FolderSource(str(folder), "train")
    in_memory = InMemory(source, 3)
    assert in_memory.fingerprint() == source.fingerprint()
    assert (len(in_memory), in_memory.classes) == (len(source), source.classes)
    for index in range(len(source)):
        assert in_memory.describe(index) == source.describe(index)
        assert in_memory.label(index) == source.label(index)
        if index != 3:
            pixels = decode(source[index]["image"], 3)
            np.testing.assert_array_equal(in_memory[index]["image"], pixels)
    assert in_memory[3]["image"] == b"", "a bad image raises only when it is read"


def test_shots_are_sampled_per_class():
    labels = [-1, 0, 1, 5, 0, 1, -1, 1]
    indices = sample_shots(labels.__getitem__, 8, ("a", "b"), 2, seed=0)
    assert sorted(labels[index] for index in indices) == [0, 0, 1, 1]
    with pytest.raises(DataError, match="data.shots=3 is more than the 2 images of class 'a'"):
        sample_shots(labels.__getitem__, 8, ("a", "b"), 3, seed=0)
