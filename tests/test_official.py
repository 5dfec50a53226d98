"""Official files by name: where they are looked for, and how they are checked."""

import hashlib
import logging

import pytest
from hub_helpers import hub_cache, write_cache  # noqa: F401

from mae_jax.convert.locate import locate
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.official import OFFICIAL_FILES

NAME = "mae_pretrain_vit_base"
URL = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"


@pytest.fixture
def caches(tmp_path, monkeypatch, hub_cache):  # noqa: F811
    """The caches of mae_jax and of torch.hub, empty, and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    ours, torch_hub = tmp_path / "cache/mae_jax", tmp_path / "cache/torch/hub/checkpoints"
    for folder in (ours, torch_hub):
        folder.mkdir(parents=True)
    return ours, torch_hub


def test_nothing_found_says_what_was_tried_and_what_belongs_where(caches):
    ours, torch_hub = caches
    with pytest.raises(ConvertError) as error:
        locate(f"{NAME}.pth")
    message = str(error.value)
    assert f"curl -L --create-dirs -o {ours}/{NAME}.pth {URL}" in message
    assert "whose MD5 begins with 8cad7c" in message
    assert f"{ours}: no {NAME}.pth" in message
    assert f"{torch_hub}: no {NAME}.pth" in message
    assert "hf download timm/vit_base_patch16_224.mae" in message


@pytest.mark.parametrize("place", [0, 1])
def test_both_caches_are_searched(caches, place, caplog):
    path = caches[place] / f"{NAME}.pth"
    path.write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "mae_jax"):
        assert locate(NAME).path == locate(f"{NAME}.pth").path == path
    assert "is not the published file: its MD5 begins with 9dd4e4, not 8cad7c" in caplog.text
    path.unlink()
    (caches[place] / f"{NAME}_full.pth").write_bytes(b"x")
    with pytest.raises(ConvertError, match=f"^{NAME} is not on this machine"):
        locate(NAME)


def test_torch_home(caches, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / f"torch/hub/checkpoints/{NAME}.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert locate(NAME).path == path


def test_the_hash_in_the_name_must_be_right(caches):
    digest = hashlib.sha256(b"x").hexdigest()[:8]
    wrong, right = (caches[1] / f"{NAME}-{text}.pth" for text in ("0" * 8, digest))
    wrong.write_bytes(b"x")
    with pytest.raises(ConvertError, match=f"{wrong}: its SHA-256 begins with {digest}, so it is"):
        locate(NAME)
    right.write_bytes(b"x")
    assert locate(NAME).path == right


def test_a_local_file_wins_and_the_hub_comes_last(caches, hub_cache, tmp_path, caplog):  # noqa: F811
    write_cache(hub_cache, "timm/vit_base_patch16_224.mae", {"config.json": b'{"architecture": 1}'})
    with pytest.raises(ConvertError, match="is not on this machine"):
        locate(NAME)
    files = {"model.safetensors": b"x", "config.json": b'{"architecture": 1}'}
    write_cache(hub_cache, "timm/vit_base_patch16_224.mae", files, commit="3" * 40)
    with caplog.at_level(logging.WARNING, "mae_jax"):
        found = locate(NAME)
    assert found.revision == "3" * 40
    assert "timm/vit_base_patch16_224.mae of the Hugging Face hub has the same" in caplog.text
    (tmp_path / NAME).mkdir()
    assert str(locate(NAME).path) == NAME


def test_a_missing_path_to_an_official_file(caches):
    with pytest.raises(ConvertError, match=f"weights/{NAME}.pth does not exist; the name {NAME},"):
        locate(f"weights/{NAME}.pth")


def test_the_table():
    assert len(OFFICIAL_FILES) == 13
    assert all(name == file.url.split("/")[-1][:-4] for name, file in OFFICIAL_FILES.items())
    assert all(len(file.md5) in (0, 6) for file in OFFICIAL_FILES.values())
