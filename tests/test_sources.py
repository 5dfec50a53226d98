"""Sources of records: folders, TFDS data sets of both kinds, arrays."""

import numpy as np
import pytest
from pictures import fill_folder, noise_image

from mae_jax.data.decode import decode
from mae_jax.data.opening import open_source
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.subsets import draw_shots, evenly_spaced
from mae_jax.data.tfds_source import TfdsSource


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path)


class TestFolder:
    def test_classes_are_sorted_folders(self, folder):
        source = FolderSource(str(folder), "train")
        assert len(source) == 20
        assert source.classes == ("ant", "zebra")
        assert source[0]["label"] == 0
        assert source[19]["key"] == str(folder / "zebra" / "9.png")

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
        assert [subset.key(i) for i in range(3)] == [source.key(i) for i in (0, 10, 19)]
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
        from mae_jax.data import embedded

        image = embedded.photograph("cat")
        border = round(image.width * embedded.TRAIN_SHARE)
        assert embedded.crops("cat", "train")[0].tobytes()
        for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
            strip = np.asarray(image)[:, left:right]
            colours = {tuple(pixel) for pixel in strip.reshape(-1, 3)}
            for crop in embedded.crops("cat", split)[:20]:
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


def test_shots_are_drawn_of_classes_only():
    labels = [-1, 0, 1, 5, 0, 1, -1, 1]
    drawn = draw_shots(labels.__getitem__, 8, ("a", "b"), 2, seed=0)
    assert sorted(labels[number] for number in drawn) == [0, 0, 1, 1]
    with pytest.raises(DataError, match="3 shots, but class 'a' has only 2 images"):
        draw_shots(labels.__getitem__, 8, ("a", "b"), 3, seed=0)
