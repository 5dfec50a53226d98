"""Import, export and adaptation of every format, compared with arrays of other programs."""

import dataclasses
import json
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL, assert_close, assert_same, nhwc
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mae_jax
from mae_jax.convert import __main__ as command
from mae_jax.convert import state_dict, weights
from mae_jax.convert.key_maps import LAYOUTS
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.networks import make_autoencoder, make_classifier, to_variables
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.patches import interpolate_pos_embed, patchify
from mae_jax.tasks import masking

GAP = "vit/v0_gap/state_dict.safetensors"  # fine-tuned with global average pooling and fc_norm


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        (OFFICIAL, HEADS),
        ("mae/p4_gray/state_dict.safetensors", HEADS),
        ("mae/p6_eps1e-5_mlp2/state_dict.safetensors", HEADS),
        ("hf/hf_tiny/pretrained_v5", {}),
        ("timm/timm_tiny.state_dict.safetensors", dict(heads=4)),
        (GAP, dict(heads=2)),
    ],
)
def test_round_trip_is_byte_identical(golden, tmp_path, source, overrides):
    before = weights.read(golden / source, **overrides)
    for dialect in weights.compatible_formats(before.info):
        expected = weights.encoder_only(before) if dialect == "timm" else before
        weights.write(before, tmp_path / f"{dialect}.safetensors", dialect)
        after = weights.read(tmp_path / f"{dialect}.safetensors")
        assert_same(after.arrays, expected.arrays)
        assert after.info == expected.info  # all metadata is kept, in the header


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept(golden, tmp_path, dtype):
    tensors = {name: x.astype(jnp.dtype(dtype)) for name, x in load_file(golden / OFFICIAL).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    checkpoint = weights.read(tmp_path / "half.safetensors", **HEADS)
    for to in ("hf", "official"):
        weights.write(checkpoint, tmp_path / f"{to}.safetensors", to)
    assert load_file(tmp_path / "hf.safetensors")["decoder.mask_token"].dtype == dtype
    assert_same(load_file(tmp_path / "official.safetensors"), tensors)


def test_official_to_huggingface_and_back(golden, tmp_path):
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6
    assert config["mask_ratio"] == 0.75
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    weights.write(weights.read(tmp_path / "hf"), tmp_path / "back.safetensors", "official")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(golden / OFFICIAL))


@pytest.mark.parametrize("source", [OFFICIAL, "vit/v0_cls/state_dict.safetensors"])
def test_directories_round_trip(golden, tmp_path, source):
    """An encoder and a classifier, with class names and all other metadata."""
    before = weights.encoder_only(weights.read(golden / source, **HEADS))
    if before.info.num_classes:
        names = tuple(f"class {i}" for i in range(10))
        info = dataclasses.replace(before.info, class_names=names)
        before = dataclasses.replace(before, info=info)
    for dialect in ("hf", "timm", "mae_jax"):
        weights.write(before, tmp_path / dialect, dialect)
        after = weights.read(tmp_path / dialect)
        assert_same(after.arrays, before.arrays)
        assert after.info == before.info


def test_layouts_of_huggingface(golden, tmp_path):
    folder = golden / "hf" / "hf_tiny"
    four = weights.read(folder / "pretrained_v4")
    assert_same(weights.read(folder / "pretrained_v5").arrays, four.arrays)
    (in_memory,) = (layout for layout in LAYOUTS if layout.variant == "5.x in memory")
    tensors = state_dict.export_state_dict(in_memory, dict(four.arrays), four.info.patch)
    assert "vit.layers.0.attention.q_proj.weight" in tensors
    save_file(tensors, tmp_path / "memory.safetensors")
    bare = weights.read(tmp_path / "memory.safetensors", heads=4, decoder_heads=3)
    assert_same(bare.arrays, four.arrays)
    assert bare.info.layer_norm_eps == 1e-12  # transformers' default, without a config.json


def test_linear_probe_with_its_batch_norm(golden, tmp_path):
    tensors = load_file(golden / "vit/v0_cls/state_dict.safetensors")
    io = load_file(golden / "vit/v0_cls/io.safetensors")
    tensors |= {
        "head.1.weight": io["head_weight"],
        "head.1.bias": io["head_bias"],
        "head.0.running_mean": io["bn1_running_mean"],
        "head.0.running_var": io["bn1_running_var"],
        "head.0.num_batches_tracked": np.array(1, np.int64),
    }
    del tensors["head.weight"], tensors["head.bias"]
    save_file(tensors, tmp_path / "probe.safetensors")
    model, params = mae_jax.load(tmp_path / "probe.safetensors", heads=2)
    assert_close(run_classifier(model, params, io["images"]).logits, io["lin_eval_logits_after"])

    probe = weights.read(tmp_path / "probe.safetensors", heads=2)
    weights.write(probe, tmp_path / "back.safetensors", "official")
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)
    for to in ("timm", "hf"):
        with pytest.raises(ConvertError, match="has no BatchNorm"):
            weights.write(probe, tmp_path / to, to)


def test_unsupported_by_a_format(golden, tmp_path, caplog):
    with pytest.raises(ConvertError, match=r"\(fc_norm\), as --to timm does"):
        weights.write(weights.read(golden / GAP, heads=2), tmp_path / "hf", "hf")
    with caplog.at_level(logging.WARNING):
        checkpoint = weights.read(golden / OFFICIAL, layer_norm_eps=1e-12, **HEADS)
        weights.write(checkpoint, tmp_path / "o.safetensors", "official")
    assert "layer_norm_eps=1e-12, which official cannot store" in caplog.text
    assert weights.read(tmp_path / "o.safetensors").info.layer_norm_eps == 1e-12
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "hf", "hf")
    assert "config.json gets norm_pix_loss=false" in caplog.text


# ---------------------------------------------------------------- recorded outputs


@pytest.mark.parametrize("folder", ["hf_tiny/pretrained_v5", "hf_tiny_plain/pretrained_v5"])
def test_forward_pass_of_huggingface(golden, folder):
    model, params = mae_jax.load(golden / "hf" / folder)
    io = load_file((golden / "hf" / folder).parent / "io.safetensors")
    patches = patchify(nhwc(io["pixel_values"]), model.info.patch)
    mask = masking.mask_from_noise(jnp.asarray(io["noise"]), int((io["mask"][0] == 0).sum()))
    task = model.task()

    @jax.jit
    def run(params, patches, mask):
        return {
            "logits": task.apply("predict", params, patches, *mask),
            "latent": task.apply("encode", params, patches, mask.ids_keep),
            "loss": task.loss_of_patches(params, patches, mask),
        }

    outputs = run(params, patches, mask)
    assert_close(outputs["logits"], io["logits"])
    assert_close(outputs["latent"], io["encoder_last_hidden_state"])
    np.testing.assert_allclose(outputs["loss"], io["loss"], atol=2e-6, rtol=2e-6)


def run_classifier(model, params, images):
    """Return the outputs for normalized images [b, c, h, w]."""
    patches = patchify(nhwc(images), model.info.patch)
    return jax.jit(make_classifier(model.info).apply)(to_variables(params), patches)


def test_forward_pass_of_timm(golden):
    path = golden / "timm/timm_tiny.state_dict.safetensors"
    model, params = mae_jax.load(path, dialect="timm", heads=4)
    assert model.info.crop == 0.9
    io = load_file(golden / "timm/timm_tiny.io.safetensors")
    outputs = run_classifier(model, params, io["images"])
    assert_close(outputs.tokens, io["forward_features"])
    assert_close(outputs.pooled, io["pre_logits"])
    assert_close(outputs.logits, io["logits"])


@pytest.mark.parametrize(("name", "pool"), [("v0_cls", "cls"), ("v0_gap", "mean")])
def test_forward_pass_of_the_official_classifier(golden, name, pool):
    folder = golden / "vit" / name
    model, params = mae_jax.load(folder / "state_dict.safetensors", heads=2)
    assert model.info.pool == pool
    io = load_file(folder / "io.safetensors")
    outputs = run_classifier(model, params, io["images"])
    assert_close(outputs.pooled, io["features"])
    assert_close(outputs.logits, io["logits"])


# ---------------------------------------------------------------- other images


@pytest.mark.parametrize("image_size", [(48, 24), (64, 64)])
def test_image_size_interpolates_both_positional_embeddings(golden, image_size):
    before = weights.read(golden / OFFICIAL, **HEADS)
    after = weights.resize_pos_embed(before, image_size)
    grid = (image_size[0] // 8, image_size[1] // 8)
    for part in ("encoder", "decoder"):
        name = f"{part}/pos_embed/table"
        expected = interpolate_pos_embed(before.arrays[name][0], (4, 4), grid)
        np.testing.assert_array_equal(after.arrays[name][0], expected)
    with pytest.raises(ConvertError, match="Use 48 or 56"):
        mae_jax.load(golden / OFFICIAL, image_size=50, **HEADS)


def test_non_square_images(golden, tmp_path):
    model, params = mae_jax.load(golden / OFFICIAL, image_size=(48, 24), **HEADS)
    pixels = np.zeros((2, 48, 24, 3), np.uint8)
    assert model.features(params, pixels, grid=True)["grid"].shape == (2, 6, 3, 32)

    checkpoint = weights.resize_pos_embed(weights.read(golden / OFFICIAL, **HEADS), (48, 24))
    for to in ("official", "hf"):
        with pytest.raises(ConvertError, match="square images only"):
            weights.write(checkpoint, tmp_path / to, to)
    weights.write(checkpoint, tmp_path / "timm", "timm")
    assert weights.read(tmp_path / "timm").info.image_size == (48, 24)
    save_file(load_file(tmp_path / "timm" / "model.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="18 patches, not 4 x 4.*--grid-size"):
        weights.read(tmp_path / "bare.safetensors", heads=2)
    bare = weights.read(tmp_path / "bare.safetensors", grid=(6, 3), heads=2)
    assert bare.info.image_size == (48, 24)
    with pytest.raises(ConvertError, match=r"\(48, 24\), which does not match a grid of \(3, 6\)"):
        weights.read(tmp_path / "timm", grid=(3, 6))


def test_channels(golden):
    """Gray images, and RGB images repeated to more channels, have the same features."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    features = {}
    for channels in (3, 1, 6):
        model, params = mae_jax.load(golden / OFFICIAL, channels=channels, **HEADS)
        info = dataclasses.replace(model.info, mean=(0.5,) * channels, std=(0.5,) * channels)
        model = dataclasses.replace(model, info=info)
        repeated = images.repeat(channels, axis=-1)
        features[channels] = model.features(params, repeated)["cls"]
    np.testing.assert_allclose(features[1], features[3], atol=1e-5)
    np.testing.assert_allclose(features[6], features[3], atol=1e-5)
    model, params = mae_jax.load(golden / OFFICIAL, target="pixels", channels=6, **HEADS)
    assert model.reconstruct(params, repeated).shape == (2, 32, 32, 6)


# ---------------------------------------------------------------- loaded models


def test_reconstruction_requires_a_decoder_and_a_target(golden):
    model, _ = mae_jax.load(golden / "timm/timm_tiny.state_dict.safetensors", heads=4)
    with pytest.raises(ConvertError, match="no decoder.*mae_pretrain_vit_base_full.pth"):
        model.task()
    model, _ = mae_jax.load(golden / OFFICIAL, **HEADS)
    with pytest.raises(ConvertError, match="--target pixels or normalized"):
        model.task()
    assert mae_jax.load(golden / OFFICIAL, target="pixels", **HEADS)[0].task().norm_pix is False


def test_reconstructions_do_not_depend_on_the_format(golden, tmp_path):
    """A model and its conversions share one compiled program, so results are bit-identical."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    checkpoint = weights.read(golden / OFFICIAL, target="normalized", **HEADS)
    reconstructions = []
    for to in ("official", "hf", "mae_jax"):
        path = tmp_path / f"{to}.safetensors"
        weights.write(checkpoint, path, to)
        model, params = mae_jax.load(path)
        model = dataclasses.replace(model, path="")  # the key of the compiled program
        reconstructions.append(np.asarray(model.reconstruct(params, images)))
    for other in reconstructions[1:]:
        np.testing.assert_array_equal(other, reconstructions[0])


def test_bfloat16_activations(golden):
    model, params = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4", dtype="bfloat16")
    assert model.execution == ExecutionConfig(dtype=jnp.dtype("bfloat16"))
    assert params["encoder"]["cls_token"].dtype == jnp.float32
    assert make_autoencoder(model.info, model.execution).encoder.execution.dtype == jnp.bfloat16
    with pytest.raises(ConvertError, match="dtype='float64'"):
        mae_jax.load(golden / "hf/hf_tiny/pretrained_v4", dtype="float64")


# ---------------------------------------------------------------- the command


def test_inspect(golden, capsys):
    command.main(["inspect", str(golden / OFFICIAL)])
    table = capsys.readouterr().out
    for text in ("official", "heads unknown", "32 x 32 x 3", "unknown", "--target needed", "hf"):
        assert text in table


def test_command(golden, tmp_path, caplog):
    source, out = golden / "hf/hf_tiny/pretrained_v5", tmp_path / "out.safetensors"
    argv = [str(source), str(out), "--to", "official"]
    with caplog.at_level(logging.WARNING):
        command.main(argv)
    assert "layer_norm_eps=1e-12, which official cannot store" in caplog.text
    with safe_open(out, framework="numpy") as file:
        assert "decoder_blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118
    process = [sys.executable, "-m", "mae_jax.convert", *argv]
    done = subprocess.run(process, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "--overwrite" in done.stderr
