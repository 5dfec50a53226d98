"""Images in Parquet files and in the cache of Hugging Face datasets."""

import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_helpers import encoded, fill_folder, noise_image
from source_helpers import assert_same_as_folder

from mae_jax.data.factory import DatasetSpec, detect_dataset
from mae_jax.data.loader import ExampleLoader
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.tables import TableSource
from mae_jax.data.transforms import EvalTransform

PICTURE = encoded(noise_image(0))
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["ant", "zebra"], "_type": "ClassLabel"},
}


@pytest.fixture
def folder(tmp_path):
    """A folder of images with the splits train and validation."""
    for split in ("train", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
        fill_folder(tmp_path / "images" / split)
    return tmp_path / "images"


def hub_table(records, features=FEATURES):
    """Return a table of images and labels as the Hugging Face hub has them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": x["image"], "path": "a.png"} for x in records], kind)
    labels = pa.array([x["label"] for x in records], pa.int64())
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


def tables_of(folder, split, count):
    source = FolderSource(str(folder), split)
    parts = np.array_split(np.arange(len(source)), count)
    return [hub_table([source[int(i)] for i in part]) for part in parts]


def write_arrow(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.fixture
def hub(folder, tmp_path):
    """The images in Parquet files, laid out as on the hub."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("validation", 1)):
        for number, table in enumerate(tables_of(folder, split, count)):
            name = f"{split}-{number:05}-of-{count:05}.parquet"
            pq.write_table(table, tmp_path / "hub" / "data" / name, row_group_size=4)
    return tmp_path / "hub"


@pytest.fixture
def cache(folder, tmp_path):
    """The images in the cache of Hugging Face datasets, as me/TinySet."""
    version = tmp_path / "cache" / "me___tiny_set" / "default" / "0.0.0" / "12ab"
    [validation] = tables_of(folder, "validation", 1)
    write_arrow(validation, version / "tiny_set-validation.arrow")
    for number, table in enumerate(tables_of(folder, "train", 2)):
        write_arrow(table, version / f"tiny_set-train-{number:05}-of-00002.arrow")
    write_arrow(validation, version / "cache-123.arrow")
    info = {"splits": {"train": {}, "validation": {}}, "features": FEATURES}
    (version / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path / "cache"


@pytest.mark.parametrize("where", ["", "data/{split}-*.parquet"])
def test_batches_of_parquet_are_those_of_the_folder(folder, hub, where):
    assert_same_as_folder(folder, None, source="parquet", path=str(hub / where))


def test_batches_of_the_cache_are_those_of_the_folder(folder, cache):
    assert_same_as_folder(folder, None, source="hf", name="me/TinySet", path=str(cache))


def test_classes_and_identity(hub):
    spec = DatasetSpec("parquet", path=str(hub))
    source = spec.open("train")
    assert source.classes == ("ant", "zebra")
    assert spec.open("validation", source.classes).classes == source.classes
    with pytest.raises(DataError, match="has the classes ant, zebra, but training has a, b"):
        spec.open("validation", ("a", "b"))
    assert pickle.loads(pickle.dumps(source))[9] == source[9]
    assert source.describe(9) == f"row 2 of {hub}/data/train-00001-of-00003.parquet"
    fingerprint = source.fingerprint()
    path = hub / "data" / "train-00002-of-00003.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert spec.open("train").fingerprint() != fingerprint


def open_columns(tmp_path, columns, image="image"):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    return TableSource([path], image=image)


def test_columns(tmp_path):
    pictures = pa.array([PICTURE, PICTURE], pa.binary())
    bare = open_columns(tmp_path, {"img": pictures})
    assert (bare[1], bare.classes) == ({"image": PICTURE, "label": -1}, ())
    numbers = open_columns(tmp_path, {"image": pictures, "label": pa.array([2, None])})
    assert ([numbers.label(0), numbers.label(1)], numbers.classes) == ([2, -1], ("0", "1", "2"))
    small = pa.array([2, None], pa.uint8())
    assert open_columns(tmp_path, {"image": pictures, "label": small}).classes == ("0", "1", "2")
    negative = open_columns(tmp_path, {"image": pictures, "label": pa.array([-5, 0])})
    assert [negative.label(0), negative.label(1)] == [-1, 0]
    both = dict(left=pictures, right=pa.array([b"1", b"2"], pa.large_binary()))
    with pytest.raises(DataError, match=r"data.image_feature='image'.*images are left, right"):
        open_columns(tmp_path, both)
    assert open_columns(tmp_path, both, "right")[1]["image"] == b"2"
    with pytest.raises(DataError, match="it has none"):
        open_columns(tmp_path, {"text": pa.array(["a"])})
    with pytest.raises(DataError, match="no images in"):
        open_columns(tmp_path, {"image": pictures[:0]})


def test_labels_that_are_not_read_are_logged(tmp_path, caplog):
    pictures = pa.array([PICTURE, PICTURE], pa.binary())
    assert open_columns(tmp_path, {"image": pictures, "label": ["a", "b"]}).classes == ()
    assert "the column label of" in caplog.text
    assert "t.parquet is string, not integers" in caplog.text
    assert open_columns(tmp_path, {"image": pictures, "label": [0, 2**40]}).classes == ()
    assert "t.parquet has label 1099511627776" in caplog.text
    table = hub_table([{"image": PICTURE, "label": 0}], dict.fromkeys("ab", FEATURES["label"]))
    two = pa.table({"image": table["image"], "a": [0], "b": [0]}, metadata=table.schema.metadata)
    pq.write_table(two, tmp_path / "t.parquet")
    assert TableSource([tmp_path / "t.parquet"]).classes == ()
    assert "t.parquet has several, a, b" in caplog.text


def test_files_must_have_the_same_columns_and_classes(tmp_path):
    records = [{"image": PICTURE, "label": 0}]
    renamed = {**FEATURES, "label": {"names": ["bee", "cat"], "_type": "ClassLabel"}}
    others = hub_table(records, renamed), hub_table(records).drop_columns(["label"])
    files = [tmp_path / f"{number}.parquet" for number in range(2)]
    pq.write_table(hub_table(records), files[0])
    for other in (*others, hub_table(records).rename_columns(["picture", "label"])):
        pq.write_table(other, files[1])
        with pytest.raises(DataError, match=r"1.parquet has other columns or .* than .*0.parquet"):
            TableSource(files)


def test_cells_without_images(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    cells += [{"bytes": None, "path": None}, {"bytes": PICTURE[:99], "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    source = open_columns(tmp_path, {"image": pa.array(cells, kind)})
    assert source[0]["image"] == PICTURE
    load = ExampleLoader(source, EvalTransform((16, 16), 3))
    reasons = ["its cell has no bytes, and no file b.png", "the cell is empty", "no file None", ""]
    for row, reason in enumerate(reasons, 1):
        with pytest.raises(DataError, match=f"row {row} of .*t.parquet is bad: .*{reason}"):
            load(row)


def test_damaged_files_and_missing_packages(hub, tmp_path, monkeypatch):
    path = hub / "data" / "train-00001-of-00003.parquet"
    content = path.read_bytes()
    spec = DatasetSpec("parquet", path=str(hub))
    source = spec.open("train")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="train-00001-of-00003.parquet cannot be read"):
        spec.open("train")
    with pytest.raises(DataError, match="train-00001-of-00003.parquet has changed since"):
        _ = source[9]
    with pytest.raises(DataError, match="no Parquet files of the split 'test'"):
        spec.open("test")
    monkeypatch.delitem(sys.modules, "mae_jax.data.tables")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'mae_jax\[parquet\]'"):
        spec.open("train")


def test_large_row_groups_are_logged(tmp_path, caplog):
    pq.write_table(pa.table({"image": [PICTURE] * 201}), tmp_path / "t.parquet")
    TableSource([tmp_path / "t.parquet"])
    assert "t.parquet has row groups of 201 images" in caplog.text


def test_names_of_cached_datasets(cache, monkeypatch, folder):
    def open_split(name, split="validation", path=str(cache)):
        return DatasetSpec("hf", name, path).open(split)

    assert len(open_split("me/tiny_set")) == 20
    with pytest.raises(DataError, match="has no split 'test'; it has train, validation"):
        open_split("me/TinySet", "test")
    with pytest.raises(DataError, match=r"data.name='me/other' is not in .*load_dataset"):
        open_split("me/other")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    assert DatasetSpec("hf", "me/TinySet").splits() == ["train", "validation"]
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    cache.rename(cache.parent / "datasets")
    assert len(open_split("me/TinySet", path=None)) == 20
    version = cache.parent / "datasets" / "me___tiny_set" / "small" / "0.0.0" / "9"
    write_arrow(tables_of(folder, "validation", 4)[0], version / "tiny_set-validation.arrow")
    (version / "dataset_info.json").write_text(json.dumps({"splits": {"validation": {}}}))
    with pytest.raises(DataError, match="several configs: me/TinySet:default, me/TinySet:small"):
        open_split("me/TinySet", path=None)
    assert len(open_split("me/TinySet:small", path=None)) == 5


def test_commands_detect_parquet_files(hub):
    assert detect_dataset(str(hub), None).splits() == ["train", "validation"]
    assert len(detect_dataset(str(hub), None).open("train")) == 20
    alone = hub / "data" / "train-00000-of-00003.parquet"
    assert len(detect_dataset(str(alone), None).open("")) == 7


def test_commands_take_cached_datasets_by_name(cache):
    spec = detect_dataset("hf:me/TinySet", str(cache))
    assert spec.splits() == ["train", "validation"]
    assert len(spec.open("train")) == 20
