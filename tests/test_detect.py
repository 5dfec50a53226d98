"""Detection of format and architecture, and errors of tensors and metadata."""

import gzip
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL, write_changed
from safetensors.numpy import load_file, save_file

from mae_jax.convert import __main__ as command
from mae_jax.convert import weights
from mae_jax.convert.detect import detect
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.weight_files import RawCheckpoint
from mae_jax.models.variants import VARIANTS


def recorded_state_dicts(golden, file, model):
    """Yield every recorded state dict of a size, as arrays that take no memory."""
    content = json.loads(gzip.decompress((golden / "conversions" / f"{file}.json.gz").read_bytes()))
    for key, value in content.items():
        if model not in key:
            continue
        for name, shapes in value.items() if file.startswith("hf") else [(key, value)]:
            if name != "config":
                shapes = shapes.get("keys", shapes)
                yield name, {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}


@pytest.mark.parametrize(
    "file",
    [
        "official_pretrain_full",
        "official_encoder_only",
        "official_models_vit",
        "timm_mae_v1.0.31",
        "hf_vitmae_v4.57.1",
        "hf_vitmae_v5.23.0",
    ],
)
@pytest.mark.parametrize(
    ("model", "variant", "million"),
    [("base", "vit_b16", 85.8), ("large", "vit_l16", 303.3), ("huge", "vit_h14", 630.8)],
)
def test_keys_and_shapes_of_the_papers_models(golden, tmp_path, file, model, variant, million):
    state_dicts = list(recorded_state_dicts(golden, file, model))
    assert state_dicts
    for name, tensors in state_dicts:
        layout, info, shapes = detect(RawCheckpoint(dict(tensors)), tmp_path)
        assert layout.dialect == ("hf" if file.startswith("hf") else "official")
        assert (info.size_name, info.heads) == (variant, VARIANTS[variant].heads)
        full = "full" in file or name == "ViTMAEForPreTraining"
        assert (info.decoder_depth, info.decoder_heads) == ((8, 16) if full else (0, 0))
        count = {
            part: sum(np.prod(s) for n, s in shapes.items() if n.startswith(part)) / 1e6
            for part in ("encoder/", "decoder/")
        }
        assert count["encoder/"] == pytest.approx(million, abs=0.06)
        assert count["decoder/"] == pytest.approx(26.2 if full else 0, abs=0.35)
        assert info.fc_norm == ("gap" in name)
        assert info.num_classes == (1000 if "official_models_vit" in file else 0)


def test_number_of_heads_is_required_for_other_sizes(golden):
    with pytest.raises(ConvertError, match="number of attention heads.*--num-heads"):
        weights.read(golden / OFFICIAL)
    with pytest.raises(ConvertError, match="--decoder-num-heads"):
        weights.read(golden / OFFICIAL, heads=2)
    with pytest.raises(ConvertError, match="has heads=4, not 8"):
        weights.read(golden / "hf/hf_tiny/pretrained_v4", heads=8)
    with pytest.raises(ConvertError, match="is not divisible by model.heads=5"):
        weights.read(golden / OFFICIAL, heads=5, decoder_heads=2)


def test_pooling_of_a_bare_file_is_a_default(golden, tmp_path, caplog):
    source = golden / "vit/v0_cls/state_dict.safetensors"
    with caplog.at_level(logging.INFO):
        assert weights.read(source, heads=2).info.pool == "cls"
    assert "using the defaults of official for" in caplog.text
    assert "pool=cls" in caplog.text
    argv = [str(source), str(tmp_path / "timm"), "--to", "timm", "--num-heads", "2"]
    command.main([*argv, "--pool", "mean"])
    assert weights.read(tmp_path / "timm").info.pool == "mean"
    with pytest.raises(ConvertError, match="pool='max' must be one of"):
        weights.read(source, heads=2, pool="max")


# ---------------------------------------------------------------- tensors


def test_all_mismatches_are_listed_and_nothing_is_written(golden, tmp_path):
    def change(tensors):
        del tensors["blocks.1.mlp.fc2.bias"]
        tensors["extra.weight"] = np.zeros((3, 4), np.float32)
        tensors["decoder_pred.weight"] = np.zeros((191, 32), np.float32)

    path = write_changed(golden, tmp_path, change)
    argv = [str(path), str(tmp_path / "out"), "--to", "hf"]
    with pytest.raises(ConvertError) as raised:
        command.main([*argv, "--num-heads", "2", "--decoder-num-heads", "2"])
    text = str(raised.value)
    assert "- blocks.1.mlp.fc2.bias (32,) is missing" in text
    assert "+ extra.weight (3, 4) is not part of the model" in text
    assert "! decoder_pred.weight has shape (191, 32), the model needs (192, 32)" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight"]
)
def test_tensor_that_determines_sizes_is_missing_or_invalid(golden, tmp_path, name):
    path = write_changed(golden, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ConvertError, match=f"- {name} is missing"):
        weights.read(path, **HEADS)
    path = write_changed(golden, tmp_path, lambda t: t.update({name: np.zeros(3, np.float32)}))
    with pytest.raises(ConvertError, match=rf"! {name} has shape \(3,\)"):
        weights.read(path, **HEADS)


def test_not_a_vit(tmp_path):
    names = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias"]
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "r.safetensors")
    with pytest.raises(ConvertError, match=r"in a supported format .*bn1.weight, conv1.weight"):
        weights.read(tmp_path / "r.safetensors")


def test_wrong_format(golden):
    with pytest.raises(ConvertError, match="not in the format hf: its keys are those of official"):
        weights.read(golden / OFFICIAL, dialect="hf", **HEADS)
    with pytest.raises(ConvertError, match="dialect='jax' must be one of mae_jax, official"):
        weights.read(golden / OFFICIAL, dialect="jax", **HEADS)


def test_positional_embedding_without_cls_token(golden, tmp_path):
    path = write_changed(golden, tmp_path, lambda t: t.update(pos_embed=t["pos_embed"][:, 1:]))
    with pytest.raises(ConvertError, match=r"without a row for the cls token .* not supported"):
        weights.read(path, **HEADS)


def test_integer_tensors(golden, tmp_path):
    path = write_changed(golden, tmp_path, lambda t: t.update({"norm.bias": np.zeros(32, np.int8)}))
    with pytest.raises(ConvertError, match=r"not floating point: norm.bias \(int8\)"):
        weights.read(path, **HEADS)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float16"), ("float32", "float16")])
def test_blocks_of_different_dtypes(golden, tmp_path, dtypes):
    """Blocks are stacked, and a conversion to one dtype would change the bits of some."""
    first, other = map(jnp.dtype, dtypes)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(other if "blocks.1.mlp.fc1" in name else first)

    path = write_changed(golden, tmp_path, change)
    with pytest.raises(ConvertError) as raised:
        weights.read(path, **HEADS)
    assert str(raised.value).count("\n") == 2
    line = f"! blocks.1.mlp.fc1.bias is {other}, but blocks.0.mlp.fc1.bias is {first}: use one"
    assert line in str(raised.value)


def test_tensors_of_different_dtypes(golden, tmp_path):
    def change(tensors):
        tensors |= {n: x.astype(np.float16) for n, x in tensors.items() if "mlp" in n}

    arrays = weights.read(write_changed(golden, tmp_path, change), **HEADS).arrays
    assert arrays["encoder/blocks/mlp/fc1/kernel"].dtype == np.float16
    assert arrays["encoder/blocks/attn/qkv/kernel"].dtype == np.float32


def test_stray_block_is_the_only_mismatch(golden, tmp_path):
    stray = {"blocks.9.norm1.weight": np.zeros(32, np.float32)}
    path = write_changed(golden, tmp_path, lambda tensors: tensors.update(stray))
    with pytest.raises(ConvertError) as raised:
        weights.read(path, **HEADS)
    assert str(raised.value).count("\n") == 1
    assert "+ blocks.9.norm1.weight (32,) is not part of the model" in str(raised.value)


def test_nan_is_reported(golden, tmp_path, caplog):
    def change(tensors):
        tensors["norm.bias"][3] = np.nan

    with caplog.at_level(logging.WARNING):
        weights.read(write_changed(golden, tmp_path, change), **HEADS)
    assert "contains NaN or Inf in encoder/norm/bias" in caplog.text


# ---------------------------------------------------------------- metadata


def test_our_file_without_metadata(golden, tmp_path):
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "o.safetensors", "mae_jax")
    save_file(load_file(tmp_path / "o.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="its metadata lacks channels, depth"):
        weights.read(tmp_path / "bare.safetensors")


def test_invalid_metadata(golden, tmp_path):
    checkpoint = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(checkpoint, tmp_path / "good.safetensors", "mae_jax")
    tensors = load_file(tmp_path / "good.safetensors")
    for name, value, message in (
        ("depth", None, "its metadata lacks depth"),
        ("image_size", "32", "image_size='32' must be height and width"),
        ("image_size", [32, 40], "encoder/pos_embed/table has shape"),
        ("patch", 0, "patch=0 must be an integer >= 1"),
        ("heads", "two", "heads='two' must be an integer >= 0"),
        ("layer_norm_eps", -1.0, "layer_norm_eps=-1.0 must be a number > 0"),
        ("crop", 0.0, "crop=0.0 must be a number > 0"),
        ("pool", "max", "pool='max' must be one of"),
        ("std", [0.0, 1.0, 1.0], "std=(0.0, 1.0, 1.0) must be 3 numbers"),
    ):
        metadata = json.loads(checkpoint.info.to_json()) | {name: value}
        metadata = {key: x for key, x in metadata.items() if x is not None}
        save_file(tensors, tmp_path / "bad.safetensors", {"mae_jax": json.dumps(metadata)})
        with pytest.raises(ConvertError) as raised:
            weights.read(tmp_path / "bad.safetensors")
        assert str(tmp_path / "bad.safetensors") in str(raised.value)
        assert message in str(raised.value)
