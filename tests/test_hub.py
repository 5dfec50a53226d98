"""Models of the Hugging Face hub: names, the cache on disk, and what is downloaded."""

import json
import logging
import re
import sys

import numpy as np
import pytest
from convert_helpers import OFFICIAL
from hub_helpers import COMMIT, downloads, hub_cache, serve_hub, write_cache  # noqa: F401
from safetensors.numpy import load_file, save

from mae_jax.convert import hub, weights
from mae_jax.convert.hub import HubName, parse_name
from mae_jax.convert.locate import locate
from mae_jax.convert.model_info import ConvertError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REPO = "org/model"
PROCESSOR = json.dumps({"image_mean": [0.1] * 3, "size": {"height": 32, "width": 32}}).encode()


@pytest.fixture(scope="module")
def files(golden):
    """The files of a small model, as transformers writes them."""
    folder = golden / "hf/hf_tiny/pretrained_v5"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"preprocessor_config.json": PROCESSOR}


@pytest.fixture(scope="module")
def sharded(files, golden):
    """The same model in two shards."""
    tensors = load_file(golden / "hf/hf_tiny/pretrained_v5/model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    index = {"weight_map": {name: part for part, each in parts.items() for name in each}}
    found = {part: save({n: tensors[n] for n in each}) for part, each in parts.items()}
    found["model.safetensors.index.json"] = json.dumps(index).encode()
    return found | {name: files[name] for name in hub.CONFIGS}


def read(text):
    return weights.read(text, require_num_heads=())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("facebook/vit-mae-base", HubName("facebook/vit-mae-base")),
        ("timm/vit_base_patch16_224.mae", HubName("timm/vit_base_patch16_224.mae")),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubName("org/name", "refs/pr/3")),
        ("hf://org/name", HubName("org/name")),
        ("hf:/org/name/", HubName("org/name")),
        ("hf://org/name@v1/a/b.safetensors", HubName("org/name", "v1", "a/b.safetensors")),
        ("hf://org/name@refs/pr/3/a.pth", HubName("org/name", "refs/pr/3", "a.pth")),
        ("hf://org/name@dev%2Fx/sub", HubName("org/name", "dev/x", "sub")),
    ],
)
def test_names(text, name):
    assert parse_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        *("model.pth", "runs/best.pth", "runs/model.safetensors", "a/b/c", "./a/b", "../gone/b"),
        *("runs/", "name", "a--b/c", "a/b..c", "a b/c", "-a/b", "a/.b", "/nowhere/b"),
    ],
)
def test_paths_are_no_names(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hint = "" if text.endswith(("pth", "safetensors")) else "; a model .* is named as org/name"
    with pytest.raises(ConvertError, match=f"^{text} does not exist{hint}$"):
        locate(text)


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://datasets/org/name", "hf://a--b/c"])
def test_addresses_without_a_model(text):
    with pytest.raises(
        ConvertError, match=re.escape(f"{text} names no model: write hf://org/name")
    ):
        locate(text)


def test_parts_of_a_name():
    name = HubName("org/name", "v 1", "a/b.safetensors")
    assert (name.folder, name.weights) == ("a", "b.safetensors")
    assert name.command == "hf download org/name a/b.safetensors --revision 'v 1'"
    name = HubName("org/name", file="a/b")
    assert (name.folder, name.weights, name.command) == ("a/b", "", "hf download org/name")


def test_the_cache_is_read_offline(hub_cache, files, golden):  # noqa: F811
    write_cache(hub_cache, REPO, files)
    write_cache(hub_cache, REPO, files, commit="2" * 40, ref="refs/pr/1")
    found = read(REPO)
    assert found.info.mean == (0.1,) * 3
    assert found.info.target == "normalized"
    expected = read(golden / "hf/hf_tiny/pretrained_v5")
    np.testing.assert_array_equal(
        found.arrays["encoder/patch_embed/kernel"], expected.arrays["encoder/patch_embed/kernel"]
    )
    assert locate(REPO).revision == locate(f"{REPO}@{COMMIT}").revision == COMMIT
    assert locate(f"{REPO}@refs/pr/1").revision == "2" * 40
    assert locate(REPO, "2" * 40).revision == "2" * 40
    assert read(f"hf://{REPO}/model.safetensors").info.image_size == found.info.image_size


def test_a_local_path_wins(hub_cache, files, golden, tmp_path, monkeypatch):  # noqa: F811
    write_cache(hub_cache, REPO, files)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / REPO).symlink_to(golden / "hf/hf_tiny/pretrained_v4")
    assert locate(REPO).revision == ""
    assert read(REPO).info.mean != (0.1,) * 3
    (tmp_path / REPO).unlink()
    (tmp_path / REPO).symlink_to("gone")
    with pytest.raises(ConvertError, match="org/model does not exist"):
        read(REPO)


def test_shards_and_folders_in_the_cache(hub_cache, sharded):  # noqa: F811
    snapshot = write_cache(hub_cache, REPO, sharded)
    assert read(REPO).info.mean == (0.1,) * 3
    write_cache(hub_cache, "org/sub", {f"a/b/{name}": x for name, x in sharded.items()})
    assert read("hf://org/sub/a/b").info.mean == (0.1,) * 3
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConvertError, match="hf download org/model$"):
        read(REPO)


@pytest.mark.parametrize("text", [REPO, f"{REPO}@v2", f"hf://{REPO}/x.safetensors"])
def test_errors_offline(text, hub_cache, files):  # noqa: F811
    write_cache(hub_cache, REPO, {"config.json": files["config.json"]})
    command = parse_name(text).command
    with pytest.raises(ConvertError) as error:
        read(text)
    sentence = str(error.value)
    assert "is not on this machine, and the Hugging Face hub is out of reach" in sentence
    assert "(HF_HUB_OFFLINE is set)" in sentence
    assert sentence.endswith(f"fetch it where there is a network with {command}")
    assert "\n" not in sentence


def test_a_lost_blob_is_not_in_the_cache(hub_cache, files):  # noqa: F811
    snapshot = write_cache(hub_cache, REPO, files)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(ConvertError, match="hf download org/model$"):
        read(REPO)


def test_unknown_config_files_are_reported(hub_cache, files, caplog):  # noqa: F811
    """As after transformers has loaded the model, which does not ask for the preprocessing."""
    write_cache(hub_cache, REPO, {n: files[n] for n in ("config.json", "model.safetensors")})
    with caplog.at_level(logging.WARNING, "mae_jax"):
        read(REPO)
    assert "org/model is read without preprocessor_config.json" in caplog.text
    assert "hf download org/model preprocessor_config.json" in caplog.text


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConvertError) as error:
        read("org/name@v1")
    assert str(error.value).endswith(
        "pip install 'mae_jax[hub]' && hf download org/name --revision v1"
    )


def test_only_what_is_read_is_downloaded(hub_cache, files, monkeypatch, golden):  # noqa: F811
    others = {"pytorch_model.bin": b"\x80pickle", "tf_model.h5": b"h5", "README.md": b"# model"}
    with serve_hub(monkeypatch, others | files) as server:
        assert read(REPO).info.mean == (0.1,) * 3
        assert sorted(downloads(server)) == sorted(files)
        server.requests.clear()
        assert read(REPO).info.mean == (0.1,) * 3
        assert server.requests == []  # the cache comes first
        with pytest.raises(ConvertError, match="org/model .* has no revision gone"):
            read(f"{REPO}@gone")
        with pytest.raises(ConvertError, match="org/other is neither on this machine nor on the"):
            read("org/other")
        with pytest.raises(ConvertError, match="no x.safetensors: choose one, as hf://org/model/"):
            read(f"hf://{REPO}/x.safetensors")


def test_shards_are_downloaded(hub_cache, sharded, monkeypatch):  # noqa: F811
    pickles = {"pytorch_model.bin": b"\x80pickle", "sub/model.safetensors": b"other"}
    with serve_hub(monkeypatch, pickles | sharded) as server:
        assert read(REPO).info.mean == (0.1,) * 3
        assert sorted(downloads(server)) == sorted(sharded)


def test_what_the_cache_lacks_is_downloaded(hub_cache, files, monkeypatch):  # noqa: F811
    """Of the cached revision, although the hub has a later one."""
    cached = {name: files[name] for name in ("config.json", "model.safetensors")}
    write_cache(hub_cache, REPO, cached)
    with serve_hub(monkeypatch, files) as server:
        assert read(REPO).info.mean == (0.1,) * 3
        assert downloads(server) == ["preprocessor_config.json"]


def test_a_missing_config_is_asked_for_once(hub_cache, files, monkeypatch):  # noqa: F811
    served = {name: files[name] for name in ("config.json", "model.safetensors")}
    with serve_hub(monkeypatch, served) as server:
        assert read(REPO).info.mean != (0.1,) * 3
        server.requests.clear()
        read(REPO)
        assert server.requests == []


def test_files_that_describe_themselves(hub_cache, golden, tmp_path, monkeypatch):  # noqa: F811
    source = weights.read(golden / OFFICIAL, heads=2, decoder_heads=2)
    weights.write(source, tmp_path / "vit.safetensors", "mae_jax")
    served = {"vit.safetensors": (tmp_path / "vit.safetensors").read_bytes(), "a.pth": b"\x80"}
    with serve_hub(monkeypatch, served) as server:
        assert read(REPO).info == source.info
        assert downloads(server) == ["vit.safetensors"]
        server.requests.clear()
        assert read(REPO).info == source.info
        assert server.requests == []


def test_a_choice_of_weights_is_an_error(hub_cache, files, monkeypatch):  # noqa: F811
    served = {"a.safetensors": b"", "b.safetensors": b"", "pytorch_model.bin": b""}
    with serve_hub(monkeypatch, served) as server:
        with pytest.raises(ConvertError, match="choose one, as hf://org/model/a.safetensors"):
            read(REPO)
        assert downloads(server) == []
