"""Files of torch.save: all that the official code writes, and what must not be opened."""

import json
import logging
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from convert_helpers import HEADS, OFFICIAL, assert_same
from safetensors.numpy import load_file

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError


@pytest.fixture
def truth(golden):
    return load_file(golden / OFFICIAL)


def read(path, **reading):
    return weights.read(path, **HEADS, **reading)


def test_official_training_checkpoint(golden, caplog):
    with caplog.at_level(logging.INFO):
        found = read(golden / "checkpoints" / "checkpoint-3.pth")
    assert_same(found.arrays, read(golden / OFFICIAL).arrays)
    assert "left behind in checkpoint-3.pth: optimizer, epoch, scaler, args" in caplog.text


@pytest.mark.parametrize("form", ["zip", "legacy", "fp16"])
def test_encoder_only_files(golden, form):
    found = weights.read(golden / "checkpoints" / f"encoder_only_{form}.pth", heads=2)
    expected = weights.encoder_only(read(golden / OFFICIAL)).arrays
    if form == "fp16":
        expected = {name: array.astype(np.float16) for name, array in expected.items()}
    assert_same(found.arrays, expected)
    assert found.info.decoder_depth == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_ours_and_back_is_byte_identical(tmp_path, truth, dtype, legacy):
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in truth.items()}
    source, middle, back = (tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth"))
    torch.save({"model": tensors}, source, _use_new_zipfile_serialization=not legacy)
    weights.write(read(source, target="pixels"), middle, "mae_jax")
    weights.write(weights.read(middle), back, "official")
    content = torch.load(back, weights_only=True)
    assert content["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert content["model"][name].dtype == dtype
        assert torch.equal(content["model"][name], tensor), name
    assert weights.read(back).info == weights.read(middle).info  # carried beside "model"


def test_official_directory_and_timm_s_bare_state_dict(golden, tmp_path, truth):
    weights.write(read(golden / OFFICIAL), tmp_path / "official", "official")
    content = torch.load(tmp_path / "official" / "checkpoint.pth", weights_only=True)
    assert_same({name: t.numpy() for name, t in content["model"].items()}, truth)
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
def test_target_kind(tmp_path, truth, name, args, target):
    from argparse import Namespace

    tensors = {key: torch.from_numpy(array) for key, array in truth.items()}
    torch.save({"model": tensors, "args": Namespace(**args)}, tmp_path / name)
    assert read(tmp_path / name).info.target == target


def test_mask_ratio_of_the_training_arguments(tmp_path, truth):
    from argparse import Namespace

    tensors = {key: torch.from_numpy(array) for key, array in truth.items()}
    torch.save({"model": tensors, "args": Namespace(mask_ratio=0.5)}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").info.mask_ratio == 0.5


def test_wrappers_and_prefixes(tmp_path, truth):
    tensors = {f"module.{key}": torch.from_numpy(array) for key, array in truth.items()}
    torch.save({"state_dict": tensors, "args": None}, tmp_path / "ddp.pth")
    torch.save({key.removeprefix("module."): t for key, t in tensors.items()}, tmp_path / "bare.pt")
    assert_same(read(tmp_path / "ddp.pth").arrays, read(tmp_path / "bare.pt").arrays)


def test_reconstruction_from_a_pth_file(tmp_path, truth):
    tensors = {key: torch.from_numpy(array) for key, array in truth.items()}
    torch.save({"model": tensors}, tmp_path / "mae_visualize_vit_tiny.pth")
    model, params = mae_jax.load(tmp_path / "mae_visualize_vit_tiny.pth", **HEADS)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    assert model.reconstruct(params, images).shape == images.shape


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/mae_jax_was_here",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, legacy):
    path = tmp_path / "bad.pth"
    torch.save({"model": Malicious()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConvertError, match="is refused: opening it would run code of .*system"):
        read(path)
    assert not os.path.exists("/tmp/mae_jax_was_here")


def test_files_that_are_no_checkpoints(golden, tmp_path):
    whole = (golden / "checkpoints" / "encoder_only_zip.pth").read_bytes()
    legacy = (golden / "checkpoints" / "encoder_only_legacy.pth").read_bytes()
    contents = {
        "cut.pth": whole[: len(whole) // 2],
        "cut_legacy.pth": legacy[: len(legacy) // 2],
        "text.pth": b"hello",
        "empty.pth": b"",
        "json.pth": json.dumps({"model": 1}).encode(),
        "plain.pth": pickle.dumps({"model": [1, 2, 3]}),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    for name in (*contents, "zip.pth", "list.pth"):
        with pytest.raises(ConvertError) as raised:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "of torch.float8_e4m3fn, which numpy lacks"),
        (torch.eye(2).to_sparse(), "sparse_coo tensor of torch.float32 on cpu, not a plain one"),
        (torch.zeros(2, device="meta"), "on meta, not a plain one"),
    ],
)
def test_tensors_without_plain_numbers(tmp_path, truth, odd, message):
    tensors = {name: torch.from_numpy(array) for name, array in truth.items()}
    torch.save(tensors | {"norm.bias": odd}, tmp_path / "a.pth")
    with pytest.raises(ConvertError, match=rf"a.pth: norm.bias is .*{message}"):
        read(tmp_path / "a.pth")


def test_a_flipped_bit_is_noticed(tmp_path, truth):
    path = tmp_path / "a.pth"
    torch.save({"model": {n: torch.from_numpy(x) for n, x in truth.items()}}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=r"a.pth is truncated or damaged: .*another checksum"):
        read(path)


def test_sums_that_torch_was_told_to_leave_out(tmp_path, truth):
    tensors = {name: torch.from_numpy(array) for name, array in truth.items()}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": tensors}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "a.pth").info.depth == 2


def test_resnet(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    torch.save(layer.state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(ConvertError, match="no MAE or ViT that is known here"):
        read(tmp_path / "resnet.pth")
