"""Tar and Parquet files in object stores: a local S3-compatible server, and fsspec's memory://."""

import logging
import pickle
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_helpers import fill_folder
from source_helpers import assert_same_as_folder, config_of, write_shards
from store_helpers import BUCKET, SECRET, serving, upload_folder

from mae_jax.data.factory import DatasetSpec, detect_dataset
from mae_jax.data.loader import ExampleLoader
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.tar import TARS
from mae_jax.data.transforms import EvalTransform
from mae_jax.utils import remote
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path
from mae_jax.utils.remote import ATTEMPTS, RemoteError, RemotePath, any_path


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server):
    """A folder of images; the store has them as tar and Parquet files."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        (root / "images" / split).mkdir(parents=True)
        source = FolderSource(str(fill_folder(root / "images" / split)), split)
        write_shards(source, root / "shards", f"tiny-{split}")
        columns = {
            "image": pa.array([source[i]["image"] for i in range(len(source))]),
            "label": pa.array([source.label(i) for i in range(len(source))]),
        }
        (root / "tables").mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), root / "tables" / f"{split}.parquet", row_group_size=4)
    for name in ("shards", "tables"):
        upload_folder(root / name, f"{BUCKET}/{name}")
        upload_folder(root / name, f"memory://bucket/{name}")
    return root / "images"


@pytest.fixture
def spec(folder, tmp_path):
    return DatasetSpec("tar", path=f"{BUCKET}/shards", index_dir=tmp_path / "indices")


@pytest.fixture(autouse=True)
def no_faults(server):
    yield
    server.fail()


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("tar", f"{BUCKET}/shards"),
        ("tar", "memory://bucket/shards/tiny-{split}-{000..002}.tar"),
        ("parquet", f"{BUCKET}/tables/{{split}}.parquet"),
    ],
)
def test_batches_are_those_of_the_folder_also_with_failing_requests(
    folder, server, tmp_path, source, path
):
    server.fail(503, 500, 503, 429)
    assert_same_as_folder(folder, tmp_path / "indices", source=source, path=path)
    assert path.startswith("memory") or not server.faults


def test_folders_and_patterns_find_the_same_objects(folder):
    found = [RemotePath(f"{BUCKET}/shards/tiny-train-{number:03}.tar") for number in range(3)]
    for pattern in ("shards/", "shards/tiny-{split}-{000..002}.tar", "sh*s/tiny-{split}-?0*.tar"):
        assert TARS.find(f"{BUCKET}/{pattern}", "train") == found
        assert TARS.has_split(f"{BUCKET}/{pattern}", "validation")
        assert not TARS.has_split(f"{BUCKET}/{pattern}", "other")


def test_shards_are_read_once_for_the_index_and_then_by_ranges(spec, server):
    first = spec.open("train")
    server.requests.clear()
    second = spec.open("train")
    assert {method for method, path, _ in server.requests if ".tar" in path} == {"HEAD"}
    assert second.fingerprint() == first.fingerprint()
    server.requests.clear()
    image = second[7]["image"]
    [(method, _, read)] = server.requests
    start, end = map(int, read.removeprefix("bytes=").split("-"))
    assert method == "GET"
    assert end - start + 1 == len(image)
    assert second.describe(7) == f"{BUCKET}/shards/tiny-train-001.tar/ant_7.png"


def test_a_source_can_be_sent_to_a_worker_process(spec):
    source = spec.open("train")
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3]


def test_an_object_that_changes_is_indexed_again_or_an_error(folder, tmp_path):
    path = RemotePath("memory://bucket/changing/a.tar")
    [first, second, _] = sorted((folder.parent / "shards").glob("tiny-train-*.tar"))
    path.upload(first)
    spec = DatasetSpec("tar", path=str(path), index_dir=tmp_path / "indices")
    source = spec.open("train")
    path.upload(second)
    assert spec.open("train").fingerprint() != source.fingerprint()
    path.write_text("short")
    assert RemotePath(f"{BUCKET}/shards/tiny-train-000.tar").read(10**9, 5) == b""
    with pytest.raises(DataError, match="a.tar has changed since it was indexed"):
        source[0]
    path.remove()
    with pytest.raises(DataError, match="cannot read memory://bucket/changing/a.tar: does not ex"):
        source[0]
    with pytest.raises(DataError, match="^memory://bucket/changing/a.tar does not exist$"):
        spec.open("train")


def test_a_read_that_keeps_failing_is_named_and_never_skipped(spec, server, caplog):
    caplog.set_level(logging.INFO)
    loader = ExampleLoader(spec.open("train"), EvalTransform((16, 16), 3), skip=True)
    row = spec.open("train")._index[0]
    server.requests.clear()
    server.fail(*[503] * ATTEMPTS)
    with pytest.raises(RemoteError) as error:
        loader(0)
    assert len(server.requests) == ATTEMPTS == 8
    assert f"cannot read bytes {row[1]} to {row[1] + row[2]} of {BUCKET}/shards/tiny-" in str(
        error.value
    )
    assert "after 8 attempts: " in str(error.value)
    assert "attempt 7 of 8" in caplog.text
    server.fail(403)
    with pytest.raises(UserError, match=r"tiny-train-000.tar: Forbidden.* credentials"):
        loader(0)
    server.fail(*[503] * ATTEMPTS, where=".parquet")
    with pytest.raises(RemoteError, match=r"train.parquet, after 8 attempts"):
        DatasetSpec("parquet", path=f"{BUCKET}/tables/train.parquet").open("train")
    server.fail(*[503] * ATTEMPTS, where="000.tar")
    with pytest.raises(RemoteError, match=r"000.tar, after 8 attempts"):
        DatasetSpec("tar", path=f"{BUCKET}/shards").open("train")
    assert SECRET not in caplog.text + str(error.value)


def test_missing_credentials_and_packages_are_named_at_once(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nothing")
        patch.setenv("AWS_CONFIG_FILE", "/nothing")
        remote._store.cache_clear()
        with pytest.raises(UserError, match=r"Unable to locate credentials\. Check"):
            RemotePath(f"{BUCKET}/x").read(0, 4)
    remote._store.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs:// needs more packages: pip install 'mae_jax\[gs\]'"):
        RemotePath("gs://bucket/x").exists()


def test_commands_detect_the_type_of_shards(folder):
    for name in ("shards", "tables"):
        dataset = detect_dataset(f"memory://bucket/{name}", None)
        assert dataset.splits() == ["train", "validation"]
        assert len(dataset.open("validation")) == 20
    RemotePath("memory://bucket/images/a.png").write_text("")
    with pytest.raises(DataError, match=r"images has neither tar files nor Parquet files, which"):
        detect_dataset("memory://bucket/images", None).open("")
    with pytest.raises(DataError, match="there are no tar files of the split 'train'"):
        DatasetSpec("tar", path=f"{BUCKET}/nothing-*.tar").open("train")


@pytest.mark.parametrize("source", ["folder", "tfds", "arrays", "hf"])
def test_other_sources_must_be_copied_first(source):
    with pytest.raises(UserError, match=r"^data.path='s3://b/x' is in an object store.* copy the"):
        config_of(source=source, path="s3://b/x")


@pytest.mark.parametrize("text", ["s3://AKIA1:s3cr3t@b/x", "gs:/s3cr3t@b/x", "S3://u:s3cr3t@b"])
def test_credentials_in_addresses_are_refused_and_not_repeated(text):
    for path in (text, Path(text)):
        with pytest.raises(UserError, match="credentials in it") as error:
            any_path(path)
        assert "s3cr3t" not in str(error.value)
        assert "AKIA1" not in str(error.value)


def test_credentials_in_errors_are_not_repeated():
    error = OSError("cannot reach http://me:s3cr3t@host/x?X-Amz-Signature=s3cr3t now")
    assert remote._reason(error) == "cannot reach http://host/x now"


def test_addresses_have_one_form():
    for text in ("s3://b/x/", "s3:/b/x", "S3://b/x", Path("s3://b/x")):
        assert expand_path(text, remote=True) == "s3://b/x"
    assert any_path("x/s3://y") == Path("x/s3:/y")
    with pytest.raises(UserError, match="needs the name of a bucket"):
        expand_path("gs://", remote=True)
    with pytest.raises(UserError, match="az:// is not supported"):
        any_path("az://b/x")
