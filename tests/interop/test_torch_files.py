"""Files of torch.save: those of the official code, corrupt ones, and unsafe ones."""

import json
import logging
import os
import pickle
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from convert_helpers import HEADS, OFFICIAL, assert_same
from safetensors.numpy import load_file

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError


@pytest.fixture
def state_dict(golden):
    """The tensors of the official file, by name."""
    return {name: torch.from_numpy(array) for name, array in load_file(golden / OFFICIAL).items()}


def read(path, **overrides):
    return weights.read(path, **HEADS, **overrides)


def test_official_training_checkpoint(golden, tmp_path, state_dict, caplog):
    """What misc.save_model writes; test_pixio.py reads a recorded one."""
    optimizer = torch.optim.AdamW([x.float().requires_grad_() for x in state_dict.values()])
    content = {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {},
        "args": Namespace(norm_pix_loss=False, mask_ratio=0.75, device="cpu"),
    }
    torch.save(content, tmp_path / "checkpoint-3.pth")
    with caplog.at_level(logging.INFO):
        checkpoint = read(tmp_path / "checkpoint-3.pth")
    assert_same(checkpoint.arrays, read(golden / OFFICIAL).arrays)
    assert "ignored in checkpoint-3.pth: optimizer, epoch, scaler, args" in caplog.text


@pytest.mark.parametrize("kind", ["zip", "legacy", "fp16"])
def test_encoder_only_files(golden, kind):
    checkpoint = weights.read(golden / "checkpoints" / f"encoder_only_{kind}.pth", heads=2)
    expected = weights.encoder_only(read(golden / OFFICIAL)).arrays
    if kind == "fp16":
        expected = {name: array.astype(np.float16) for name, array in expected.items()}
    assert_same(checkpoint.arrays, expected)
    assert checkpoint.info.decoder_depth == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_round_trip_is_byte_identical(tmp_path, state_dict, dtype, legacy):
    tensors = {name: tensor.to(dtype) for name, tensor in state_dict.items()}
    source, middle, back = (tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth"))
    torch.save({"model": tensors}, source, _use_new_zipfile_serialization=not legacy)
    weights.write(read(source, target="pixels"), middle, "mae_jax")
    weights.write(weights.read(middle), back, "official")
    content = torch.load(back, weights_only=True)
    assert content["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert content["model"][name].dtype == dtype
        assert torch.equal(content["model"][name], tensor), name
    assert weights.read(back).info == weights.read(middle).info  # stored next to "model"


def test_official_directory_and_bare_state_dict_of_timm(golden, tmp_path, state_dict):
    weights.write(read(golden / OFFICIAL), tmp_path / "official", "official")
    content = torch.load(tmp_path / "official" / "checkpoint.pth", weights_only=True)
    assert content["model"].keys() == state_dict.keys()
    assert all(torch.equal(content["model"][name], state_dict[name]) for name in state_dict)
    assert_same(read(tmp_path / "official").arrays, read(golden / OFFICIAL).arrays)
    weights.write(read(golden / OFFICIAL), tmp_path / "timm.pth", "timm")
    bare = torch.load(tmp_path / "timm.pth", weights_only=True)
    assert all(torch.is_tensor(tensor) for tensor in bare.values())


@pytest.mark.parametrize(
    ("name", "args", "target"),
    [
        ("mae_visualize_vit_base.pth", {}, "pixels"),
        ("mae_pretrain_vit_base_full.pth", {}, "normalized"),
        ("checkpoint-9.pth", {"norm_pix_loss": True}, "normalized"),
        ("checkpoint-9.pth", {"norm_pix_loss": False}, "pixels"),
        ("checkpoint-9.pth", {}, "unknown"),
    ],
)
def test_target(tmp_path, state_dict, name, args, target):
    torch.save({"model": state_dict, "args": Namespace(**args)}, tmp_path / name)
    assert read(tmp_path / name).info.target == target


def test_mask_ratio_of_the_training_arguments(tmp_path, state_dict):
    torch.save({"model": state_dict, "args": Namespace(mask_ratio=0.5)}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").info.mask_ratio == 0.5


def test_state_dict_keys_and_prefixes(tmp_path, state_dict):
    prefixed = {f"module.{key}": tensor for key, tensor in state_dict.items()}
    torch.save({"state_dict": prefixed, "args": None}, tmp_path / "ddp.pth")
    torch.save(state_dict, tmp_path / "bare.pt")
    assert_same(read(tmp_path / "ddp.pth").arrays, read(tmp_path / "bare.pt").arrays)


def test_reconstruction_from_a_pth_file(tmp_path, state_dict):
    torch.save({"model": state_dict}, tmp_path / "mae_visualize_vit_tiny.pth")
    model, params = mae_jax.load(tmp_path / "mae_visualize_vit_tiny.pth", **HEADS)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert model.reconstruct(params, images).shape == images.shape


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/mae_jax_was_here",)


@pytest.mark.parametrize("legacy", [False, True])
def test_unsafe_pickle_is_not_loaded(tmp_path, legacy):
    path = tmp_path / "bad.pth"
    torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConvertError, match="is not loaded: unpickling would run code of .*system"):
        read(path)
    assert not os.path.exists("/tmp/mae_jax_was_here")


def test_corrupt_files(golden, tmp_path):
    content = (golden / "checkpoints" / "encoder_only_zip.pth").read_bytes()
    legacy = (golden / "checkpoints" / "encoder_only_legacy.pth").read_bytes()
    contents = {
        "cut.pth": content[: len(content) // 2],
        "cut_legacy.pth": legacy[: len(legacy) // 2],
        "text.pth": b"hello",
        "empty.pth": b"",
        "json.pth": json.dumps({"model": 1}).encode(),
        "plain.pth": pickle.dumps({"model": [1, 2, 3]}),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    for name in (*contents, "zip.pth", "list.pth"):
        with pytest.raises(ConvertError) as raised:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "dtype torch.float8_e4m3fn, which numpy lacks"),
        (torch.eye(2).to_sparse(), "sparse_coo tensor of torch.float32 on cpu: save it as a dense"),
        (torch.zeros(2, device="meta"), "on meta: save it as a dense"),
    ],
)
def test_unsupported_tensors(tmp_path, state_dict, tensor, message):
    torch.save(state_dict | {"norm.bias": tensor}, tmp_path / "a.pth")
    with pytest.raises(ConvertError, match=rf"a.pth: norm.bias (is|has) .*{message}"):
        read(tmp_path / "a.pth")


def test_flipped_bit_is_detected(tmp_path, state_dict):
    path = tmp_path / "a.pth"
    torch.save({"model": state_dict}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"a.pth is truncated or corrupt .*the checksum of"):
        read(path)


def test_file_without_checksums(tmp_path, state_dict):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": state_dict}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a.pth").info.depth == 2


def test_resnet(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    torch.save(layer.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ConvertError, match="is not an MAE or ViT in a supported format"):
        read(tmp_path / "resnet.pth")
