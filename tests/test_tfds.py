"""TFDS datasets, prepared as array_record or TFRecord, read without TensorFlow."""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from mae_jax.data import demo_dataset
from mae_jax.data.decode import decode
from mae_jax.data.sources import DataError
from mae_jax.data.tfds import TfdsSource
from mae_jax.utils.errors import UserError

TFRECORDS = Path(__file__).parent / "tfrecord"


class TestTfdsSource:
    def test_demo_dataset(self, photo_crops):
        train, test = (TfdsSource("photo_crops", s, photo_crops) for s in ("train", "test"))
        assert len(train) == 19 * 400
        assert len(test) == 19 * 80
        assert len(train.classes) == 19
        labels = [train[index]["label"] for index in range(0, len(train), 40)]
        assert set(labels) == set(range(19)), "array_record is shuffled and labeled"
        assert min(decode(train[0]["image"], 3).shape[:2]) >= 64
        assert train.fingerprint() != test.fingerprint()
        assert len(TfdsSource("photo_crops", "train[:50%]", photo_crops)) == 19 * 200
        assert "tensorflow" not in sys.modules

    def test_train_and_test_crops_of_the_demo_dataset_are_disjoint(self):
        image = demo_dataset.photograph("cat")
        border = round(image.width * demo_dataset.TRAIN_FRACTION)
        for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
            region = np.asarray(image)[:, left:right]
            colors = {tuple(pixel) for pixel in region.reshape(-1, 3)}
            for crop in demo_dataset.crops("cat", split)[:5]:
                assert {tuple(pixel) for pixel in np.asarray(crop).reshape(-1, 3)} <= colors

    def test_missing_package_of_the_demo_dataset(self, monkeypatch, tmp_path):
        photographs = {"cat": ("not_installed", "cat.png")}
        monkeypatch.setattr(demo_dataset, "PHOTOGRAPHS", photographs)
        with pytest.raises(UserError, match=r"not_installed, which is not installed: .*\[demo\]"):
            TfdsSource("photo_crops", "train", str(tmp_path))

    @pytest.mark.parametrize(
        ("split", "message"),
        [
            ("val", "photo_crops has no split 'val'; it has train, test"),
            ("test[:0]", r"the split 'test\[:0\]' of photo_crops is empty"),
            ("test[:x]", r"'test\[:x\]' is not a split of photo_crops"),
        ],
    )
    def test_invalid_splits(self, photo_crops, split, message):
        with pytest.raises(DataError, match=message):
            TfdsSource("photo_crops", split, photo_crops)

    def test_unknown_and_unprepared_datasets(self, tmp_path):
        with pytest.raises(DataError, match="no dataset 'imagenot': TFDS does not know it"):
            TfdsSource("imagenot", "train", str(tmp_path))
        with pytest.raises(DataError, match="cifar10 is not prepared in"):
            TfdsSource("cifar10", "train", str(tmp_path))


def labels_and_checksums(source):
    """Label and CRC32 of the image of every record, as in tfrecord/expected.json."""
    as_bytes = lambda image: image if isinstance(image, bytes) else image.tobytes()
    records = [source[index] for index in range(len(source))]
    return [(record["label"], zlib.crc32(as_bytes(record["image"]))) for record in records]


def read_by_tensorflow(split):
    """Label and CRC32 of the image of every record, as TensorFlow reads them."""
    return [tuple(pair) for pair in json.loads((TFRECORDS / "expected.json").read_text())[split]]


class TestTfRecordFiles:
    """TFRecord files written by TensorFlow, compared with what TensorFlow reads from them."""

    @pytest.fixture
    def copied(self, tmp_path):
        """A copy of tiny_set to corrupt, and its training shards."""
        shutil.copytree(TFRECORDS / "tiny_set", tmp_path / "tiny_set")
        return str(tmp_path), sorted(tmp_path.glob("tiny_set/1.2.0/tiny_set-train.tfrecord*"))

    @pytest.mark.parametrize("split", ["train", "train[3:10]", "test"])
    def test_records_equal_tensorflow(self, split):
        source = TfdsSource("tiny_set", split, str(TFRECORDS))
        assert labels_and_checksums(source) == read_by_tensorflow(f"tiny_set {split}")
        assert source.classes == ("a", "b", "c")
        assert decode(source[0]["image"], 3).shape[1:] == (9, 3)

    def test_concatenated_splits(self):
        source = TfdsSource("tiny_set", "train[:3]+test", str(TFRECORDS))
        expected = read_by_tensorflow("tiny_set train")[:3] + read_by_tensorflow("tiny_set test")
        assert labels_and_checksums(source) == expected

    def test_multichannel_feature(self):
        source = TfdsSource("many_bands", "train[2:]", str(TFRECORDS), image_feature="bands")
        assert labels_and_checksums(source) == read_by_tensorflow("many_bands train[2:]")
        assert decode(source[0]["image"], 5).shape == (6, 6, 5)
        message = r"data.image_feature='image' is not a feature of many_bands, which has .*bands"
        with pytest.raises(DataError, match=message):
            TfdsSource("many_bands", "train", str(TFRECORDS))

    def test_index_is_cached(self, tmp_path, caplog):
        with caplog.at_level("INFO"):
            for _ in range(2):
                source = TfdsSource("tiny_set", "train", str(TFRECORDS), index_dir=tmp_path / "i")
                assert labels_and_checksums(source) == read_by_tensorflow("tiny_set train")
        assert caplog.text.count("indexing 3 TFRecord files") == 1
        assert [path.name[:9] for path in (tmp_path / "i").iterdir()] == ["tiny_set-"]

    def test_rewritten_files_are_indexed_again(self, copied, tmp_path):
        data_dir, shards = copied
        for mtime in (1, 2):
            for shard in shards:
                os.utime(shard, (mtime, mtime))
            TfdsSource("tiny_set", "train", data_dir, index_dir=tmp_path / "index")
        assert len(list((tmp_path / "index").iterdir())) == 2

    def test_unwritable_index_cache_is_only_a_warning(self, tmp_path, caplog):
        (tmp_path / "index").write_text("a file")
        source = TfdsSource("tiny_set", "train", str(TFRECORDS), index_dir=tmp_path / "index")
        assert len(source) == 14
        assert "cannot cache the index of TFRecord files" in caplog.text

    def test_corrupt_record_is_a_data_error(self, copied):
        data_dir, shards = copied
        data = bytearray(shards[0].read_bytes())
        data[12:20] = b"\xff" * 8
        shards[0].write_bytes(data)
        with pytest.raises(DataError, match="its record cannot be read"):
            TfdsSource("tiny_set", "train", data_dir)[0]

    def test_truncated_and_missing_files(self, copied):
        data_dir, (_, shard, _) = copied
        data = shard.read_bytes()
        source = TfdsSource("tiny_set", "train", data_dir)
        shard.write_bytes(data[:-1])
        with pytest.raises(DataError, match="00001-of-00003 is truncated.* at record"):
            TfdsSource("tiny_set", "train", data_dir)
        shard.write_bytes(data[:100])
        with pytest.raises(DataError, match="00001-of-00003 has changed since it was indexed"):
            labels_and_checksums(source)
        shard.write_bytes(b"")
        with pytest.raises(DataError, match="00001-of-00003 has 0 records, but"):
            TfdsSource("tiny_set", "train", data_dir)
        shard.unlink()
        with pytest.raises(DataError, match="00001-of-00003 does not exist"):
            TfdsSource("tiny_set", "train", data_dir)
