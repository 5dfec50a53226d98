"""Every dialect in and out, held to arrays and names recorded from the other programs."""

import dataclasses
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mae_jax
from mae_jax.convert import __main__ as command
from mae_jax.convert import state_dict, weights
from mae_jax.convert.detect import detect
from mae_jax.convert.key_maps import LAYOUTS
from mae_jax.convert.model_info import ConvertError, make_autoencoder
from mae_jax.convert.weight_files import RawCheckpoint
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import interpolate_pos_embed, patchify
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks import masking
from mae_jax.tasks.pretrain import Pretrain

HEADS = dict(heads=2, decoder_heads=2)
OFFICIAL = "checkpoints/full_state_dict.safetensors"


def nhwc(images):
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(found - expected).max() <= 5e-5 * np.abs(expected).max()


# ---------------------------------------------------------------- names and shapes


def recorded_models():
    for file in (
        "official_pretrain_full",
        "official_encoder_only",
        "official_models_vit",
        "timm_mae_v1.0.31",
        "hf_vitmae_v4.57.1",
        "hf_vitmae_v5.23.0",
    ):
        for model in ("base", "large", "huge"):
            yield file, model


def tensors_of(golden, file, model):
    """Every set of recorded names and shapes of a size, as arrays that take no memory."""
    content = json.loads(gzip.decompress((golden / "conversions" / f"{file}.json.gz").read_bytes()))
    for key, value in content.items():
        if model not in key:
            continue
        for name, shapes in value.items() if file.startswith("hf") else [(key, value)]:
            if name != "config":
                shapes = shapes.get("keys", shapes)
                yield name, {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}


@pytest.mark.parametrize(("file", "model"), [*recorded_models()])
def test_every_name_and_shape_of_the_paper_s_sizes(golden, tmp_path, file, model):
    size = {"base": "vit_b16", "large": "vit_l16", "huge": "vit_h14"}[model]
    encoder = {"base": 85.8, "large": 303.3, "huge": 630.8}[model]
    sets = list(tensors_of(golden, file, model))
    assert sets
    for name, tensors in sets:
        layout, info, shapes = detect(RawCheckpoint(dict(tensors)), tmp_path)
        assert layout.dialect == ("hf" if file.startswith("hf") else "official")
        assert (info.size_name, info.heads) == (size, VARIANTS[size].heads)
        full = "full" in file or name == "ViTMAEForPreTraining"
        assert (info.decoder_depth, info.decoder_heads) == ((8, 16) if full else (0, 0))
        count = {
            part: sum(np.prod(s) for n, s in shapes.items() if n.startswith(part)) / 1e6
            for part in ("encoder/", "decoder/")
        }
        assert count["encoder/"] == pytest.approx(encoder, abs=0.06)
        assert count["decoder/"] == pytest.approx(26.2 if full else 0, abs=0.35)
        assert info.fc_norm == ("gap" in name)
        assert info.num_classes == (1000 if "official_models_vit" in file else 0)


def test_known_sizes_need_no_number_of_heads_and_others_do(golden):
    with pytest.raises(ConvertError, match="number of attention heads.*--num-heads"):
        weights.read(golden / OFFICIAL)
    with pytest.raises(ConvertError, match="--decoder-num-heads"):
        weights.read(golden / OFFICIAL, heads=2)
    with pytest.raises(ConvertError, match="has heads=4, not 8"):
        weights.read(golden / "hf/hf_tiny/pretrained_v4", heads=8)
    with pytest.raises(ConvertError, match="is not divisible by model.heads=5"):
        weights.read(golden / OFFICIAL, heads=5, decoder_heads=2)


# ---------------------------------------------------------------- round trips


def sources():
    full = ("mae_jax", "official", "hf", "timm")
    return [
        *((OFFICIAL, HEADS, to) for to in full),
        *(("mae/p4_gray/state_dict.safetensors", HEADS, to) for to in full),
        *(("mae/p6_eps1e-5_mlp2/state_dict.safetensors", HEADS, to) for to in full),
        *(("hf/hf_tiny/pretrained_v5", {}, to) for to in full),
        *(("timm/timm_tiny.state_dict.safetensors", dict(heads=4), to) for to in full),
        *(("vit/v0_gap/state_dict.safetensors", dict(heads=2), to) for to in full if to != "hf"),
    ]


@pytest.mark.parametrize(("source", "reading", "dialect"), sources())
def test_round_trip_is_byte_identical(golden, tmp_path, source, reading, dialect):
    before = weights.read(golden / source, **reading)
    kept = weights.encoder_only(before) if dialect == "timm" else before
    middle = tmp_path / "middle.safetensors"
    weights.write(weights.Weights(dict(before.arrays), before.info), middle, dialect)
    after = weights.read(middle)
    assert_same(after.arrays, kept.arrays)
    assert after.info == kept.info  # heads, eps, target, preparation: all of it travels


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_what_it_is(golden, tmp_path, dtype):
    tensors = {name: x.astype(jnp.dtype(dtype)) for name, x in load_file(golden / OFFICIAL).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    for to in ("hf", "mae_jax", "official"):
        weights.write(
            weights.read(tmp_path / "half.safetensors", **HEADS), tmp_path / f"{to}.safetensors", to
        )
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
@pytest.mark.parametrize("dialect", ["hf", "timm", "mae_jax"])
def test_directories_round_trip(golden, tmp_path, source, dialect):
    """An encoder alone and a classifier, with everything that travels beside the arrays."""
    names = tuple(f"class {i}" for i in range(10))
    before = weights.encoder_only(weights.read(golden / source, heads=2, decoder_heads=2))
    if before.info.num_classes:
        info = dataclasses.replace(before.info, class_names=names)
        before = dataclasses.replace(before, info=info)
    weights.write(before, tmp_path / "out", dialect)
    after = weights.read(tmp_path / "out")
    assert_same(after.arrays, before.arrays)
    assert after.info == before.info


def test_all_three_layouts_of_huggingface(golden, tmp_path):
    folder = golden / "hf" / "hf_tiny"
    four = weights.read(folder / "pretrained_v4")
    assert_same(weights.read(folder / "pretrained_v5").arrays, four.arrays)
    (in_memory,) = (o for o in LAYOUTS if o.variant == "5.x in memory")
    tensors = state_dict.export_state_dict(in_memory, dict(four.arrays), four.info.patch)
    assert "vit.layers.0.attention.q_proj.weight" in tensors
    save_file(tensors, tmp_path / "memory.safetensors")
    found = weights.read(tmp_path / "memory.safetensors", heads=4, decoder_heads=3)
    assert_same(found.arrays, four.arrays)
    assert found.info.layer_norm_eps == 1e-12  # transformers' default, where no config.json tells


def test_sharded_directory(golden, tmp_path):
    whole = golden / "hf" / "hf_tiny" / "pretrained_v4"
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    assert_same(weights.read(tmp_path).arrays, weights.read(whole).arrays)
    save_file({name: tensors[name] for name in names[1:-2:2]}, tmp_path / file)
    with pytest.raises(ConvertError, match=rf"that its files lack: {names[-1]} \({file}\)$"):
        weights.read(tmp_path)


# ---------------------------------------------------------------- the numbers of the others


@pytest.mark.parametrize(
    "folder", ["hf_tiny/pretrained_v4", "hf_tiny/pretrained_v5", "hf_tiny_plain/pretrained_v5"]
)
def test_huggingface_s_forward_pass(golden, folder):
    model, params = mae_jax.load(golden / "hf" / folder)
    io = load_file((golden / "hf" / folder).parent / "io.safetensors")
    patches = patchify(nhwc(io["pixel_values"]), model.info.patch)
    mask = masking.mask_from_noise(jnp.asarray(io["noise"]), int((io["mask"][0] == 0).sum()))
    task = model.task()
    run = jax.jit(task.apply, static_argnums=0)
    assert_close(run("predict", params, patches, *mask), io["logits"])
    assert_close(run("encode", params, patches, mask.ids_keep), io["encoder_last_hidden_state"])
    loss = jax.jit(task.loss_of_patches)(params, patches, mask)
    np.testing.assert_allclose(loss, io["loss"], atol=2e-6, rtol=2e-6)


def outputs_of(model, params, images):
    """The outputs for already normalised images [b, c, h, w]."""
    from mae_jax.convert.model_info import make_classifier, to_variables

    patches = patchify(nhwc(images), model.info.patch)
    return jax.jit(make_classifier(model.info).apply)(to_variables(params), patches)


def test_timm_s_forward_pass(golden):
    path = golden / "timm/timm_tiny.state_dict.safetensors"
    model, params = mae_jax.load(path, dialect="timm", heads=4)
    assert model.info.crop == 0.9
    io = load_file(golden / "timm/timm_tiny.io.safetensors")
    outputs = outputs_of(model, params, io["images"])
    assert_close(outputs.tokens, io["forward_features"])
    assert_close(outputs.pooled, io["pre_logits"])
    assert_close(outputs.logits, io["logits"])


@pytest.mark.parametrize("name", ["v0_cls", "v0_gap"])
def test_official_classifier(golden, name):
    folder = golden / "vit" / name
    model, params = mae_jax.load(folder / "state_dict.safetensors", heads=2)
    assert model.info.pool == ("mean" if name == "v0_gap" else "cls")
    io = load_file(folder / "io.safetensors")
    outputs = outputs_of(model, params, io["images"])
    assert_close(outputs.pooled, io["features"])
    assert_close(outputs.logits, io["logits"])


def test_the_pooling_that_a_bare_file_does_not_tell(golden, tmp_path, caplog):
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
    assert_close(outputs_of(model, params, io["images"]).logits, io["lin_eval_logits_after"])

    found = weights.read(tmp_path / "probe.safetensors", heads=2)
    weights.write(found, tmp_path / "back.safetensors", "official")
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)
    for to in ("timm", "hf"):
        with pytest.raises(ConvertError, match="has no BatchNorm"):
            weights.write(weights.read(tmp_path / "probe.safetensors", heads=2), tmp_path / to, to)


# ---------------------------------------------------------------- other images


@pytest.mark.parametrize("image_size", [(48, 24), (64, 64)])
def test_another_image_size_resamples_both_tables(golden, image_size):
    before = weights.read(golden / OFFICIAL, **HEADS)
    after = weights.resize_pos_embed(before, image_size)
    grid = (image_size[0] // 8, image_size[1] // 8)
    for part in ("encoder", "decoder"):
        name = f"{part}/pos_embed/table"
        expected = interpolate_pos_embed(before.arrays[name][0], (4, 4), grid)
        np.testing.assert_array_equal(after.arrays[name][0], expected)
    model, params = mae_jax.load(golden / OFFICIAL, image_size=image_size, **HEADS)
    images = np.zeros((2, *image_size, 3), np.uint8)
    assert model.features(params, images, grid=True)["grid"].shape == (2, *grid, 32)
    with pytest.raises(ConvertError, match="Use 48 or 56"):
        mae_jax.load(golden / OFFICIAL, image_size=50, **HEADS)


def test_non_square_weights_travel_and_are_asked_for_where_they_cannot(golden, tmp_path):
    found = weights.resize_pos_embed(weights.read(golden / OFFICIAL, **HEADS), (48, 24))
    for to in ("official", "hf"):
        with pytest.raises(ConvertError, match="square images only"):
            weights.write(found, tmp_path / to, to)
    weights.write(found, tmp_path / "timm", "timm")
    assert weights.read(tmp_path / "timm").info.image_size == (48, 24)
    bare = load_file(tmp_path / "timm" / "model.safetensors")
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="18 patches, not 4 x 4.*--grid-size"):
        weights.read(tmp_path / "bare.safetensors", heads=2)
    found = weights.read(tmp_path / "bare.safetensors", grid=(6, 3), heads=2)
    assert found.info.image_size == (48, 24)


def test_other_channels_answer_alike(golden):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    model, params = mae_jax.load(golden / OFFICIAL, target="pixels", **HEADS)
    model = model_without_statistics(model)
    rgb = model.features(params, images.repeat(3, axis=-1))["cls"]
    for channels in (1, 6):
        other, other_params = mae_jax.load(
            golden / OFFICIAL, target="pixels", channels=channels, **HEADS
        )
        other = model_without_statistics(other)
        found = other.features(other_params, images.repeat(channels, axis=-1))["cls"]
        np.testing.assert_allclose(found, rgb, atol=1e-5)
        picture = other.reconstruct(other_params, images.repeat(channels, axis=-1))
        assert picture.shape == (2, 32, 32, channels)


def model_without_statistics(model):
    channels = model.info.channels
    info = dataclasses.replace(model.info, mean=(0.5,) * channels, std=(0.5,) * channels)
    return dataclasses.replace(model, info=info)


# ---------------------------------------------------------------- runs of ours


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two checkpoints of a tiny model, and the parameters of the last."""
    workdir = tmp_path_factory.mktemp("run")
    model = dict(image_size=(16, 24), channels=3, patch=8, width=16, depth=2, heads=2)
    model |= dict(decoder_width=16, decoder_depth=1, decoder_heads=4, mlp_ratio=2.0)
    model |= dict(layer_norm_eps=1e-5, position="sincos")
    size = VARIANTS["vit_b16"].__class__(16, 2, 2, 8, 16, 1, 4, mlp_ratio=2.0)
    mae = make_mae(size, grid=(2, 3), layer_norm_eps=1e-5)
    task = Pretrain(
        model=mae, grid=(2, 3), patch=8, mean=(0.5,) * 3, std=(0.25,) * 3, mask_ratio=0.5
    )
    data = dict(mean=(0.5,) * 3, std=(0.25,) * 3, eval_crop=1.0)
    target = dict(norm_pix=True, norm_pix_eps=1e-2)
    config = {"task": "pretrain", "model": model, "data": data, "target": target}
    config |= {"mask": {"kind": "random", "ratio": 0.5}}
    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=3)
    for step in (5, 10):
        params = jax.jit(task.init)(jax.random.key(step))
        ema = jax.tree.map(lambda x: x / 2, params)
        state = {"params": params, "ema": ema, "step": jnp.int32(step), "opt_state": ()}
        checkpointer.save(step, state, {"config": config, "data_fingerprint": ""})
    checkpointer.close()
    return workdir, task, params


def test_a_run_by_any_of_its_folders(run):
    workdir, task, params = run
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    expected = jax.jit(task.features)(params, jnp.asarray(images))
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "10"):
        model, loaded = mae_jax.load(path)
        found = model.features(loaded, images)["mean"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    info = model.info
    assert (info.source, info.target, info.norm_pix_eps) == ("mae_jax", "normalized", 1e-2)
    assert (info.image_size, info.crop, info.layer_norm_eps) == ((16, 24), 1.0, 1e-5)
    assert info.mean == (0.5,) * 3
    _, averaged = mae_jax.load(workdir, ema=True)
    np.testing.assert_array_equal(
        averaged["encoder"]["cls_token"], params["encoder"]["cls_token"] / 2
    )
    older = weights.read(workdir / "checkpoints" / "5")
    assert (older.arrays["encoder/cls_token"] != params["encoder"]["cls_token"]).any()


def test_a_run_reconstructs_as_it_did_in_training(run):
    workdir, task, params = run
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8))
    mask = task.sample_mask(jax.random.key(3), 2)
    model, loaded = mae_jax.load(workdir)
    found, expected = (
        np.int32(pictures)
        for pictures in (
            model.reconstruct(loaded, images, seed=3),
            task.reconstruct(params, images, mask, "visible"),
        )
    )
    assert np.abs(found - expected).max() <= 1  # of 255: rounding


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_run_to_huggingface_and_timm(run, tmp_path, caplog):
    workdir, _, _ = run
    before = weights.read(workdir)
    square = weights.resize_pos_embed(before, (16, 16))
    weights.write(square, tmp_path / "hf", "hf")
    before, after = square, weights.read(tmp_path / "hf")
    assert_same(after.arrays, before.arrays)
    assert after.info == before.info
    assert after.info.mask_ratio == 0.5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["mask_ratio"] == 0.5
    assert (tmp_path / "hf" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(workdir), tmp_path / "timm", "timm")
    assert "layer_norm_eps=1e-05, which timm cannot store" in caplog.text
    assert "timm has no decoder" in caplog.text
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5] * 3


def test_a_damaged_step_gives_way_to_the_one_before(run, tmp_path, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(run[0], workdir)
    for file in (workdir / "checkpoints" / "10" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:-100] + b"x" * 100)
    with caplog.at_level(logging.WARNING):
        found = weights.read(workdir)
    assert "is damaged" in caplog.text
    expected = weights.read(run[0] / "checkpoints" / "5")
    assert_same(found.arrays, expected.arrays)
    assert (workdir / "checkpoints" / "10").is_dir()  # reading changes nothing


# ---------------------------------------------------------------- bad input


def spoil(golden, tmp_path, change):
    tensors = load_file(golden / OFFICIAL)
    change(tensors)
    path = tmp_path / "spoiled.safetensors"
    save_file(tensors, path)
    return path


def test_everything_wrong_is_told_at_once_and_nothing_is_written(golden, tmp_path):
    def change(tensors):
        del tensors["blocks.1.mlp.fc2.bias"]
        tensors["extra.weight"] = np.zeros((3, 4), np.float32)
        tensors["decoder_pred.weight"] = np.zeros((191, 32), np.float32)

    path = spoil(golden, tmp_path, change)
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
def test_a_tensor_that_tells_the_size_is_missing_or_odd(golden, tmp_path, name):
    path = spoil(golden, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(ConvertError, match=f"- {name} is missing"):
        weights.read(path, **HEADS)
    odd = lambda tensors: tensors.update({name: np.zeros(3, np.float32)})  # noqa: E731
    with pytest.raises(ConvertError, match=rf"! {name} has shape \(3,\)"):
        weights.read(spoil(golden, tmp_path, odd), **HEADS)


def test_not_a_vit(tmp_path):
    names = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "fc.weight", "fc.bias"]
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "r.safetensors")
    with pytest.raises(ConvertError, match="in a supported format .*bn1.weight, conv1.weight"):
        weights.read(tmp_path / "r.safetensors")


def test_wrong_dialect(golden):
    with pytest.raises(ConvertError, match="not in the format hf: its keys are those of official"):
        weights.read(golden / OFFICIAL, dialect="hf", **HEADS)


def test_files_that_are_none(golden, tmp_path):
    whole = (golden / OFFICIAL).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("cut", "text"):
        with pytest.raises(ConvertError, match=f"{name}.safetensors is truncated, corrupt or not"):
            weights.read(tmp_path / f"{name}.safetensors")
    with pytest.raises(ConvertError, match="empty.safetensors is empty"):
        weights.read(tmp_path / "empty.safetensors")
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + b"0" * 100)
    with pytest.raises(ConvertError, match="is a file of torch.save or a zip: rename it to .pth"):
        weights.read(tmp_path / "zip.safetensors")
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ConvertError, match="git lfs pull"):
        weights.read(tmp_path / "lfs.pth")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ConvertError, match="is not a checkpoint: its name"):
        weights.read(tmp_path / "readme.txt")
    with pytest.raises(ConvertError, match="does not exist"):
        weights.read(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match="is not a workdir and has no weights files"):
        weights.read(tmp_path / "empty")


def test_ours_without_metadata(golden, tmp_path):
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "o.safetensors", "mae_jax")
    save_file(load_file(tmp_path / "o.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="its metadata lacks channels, depth"):
        weights.read(tmp_path / "bare.safetensors")


def test_odd_metadata(golden, tmp_path):
    found = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(found, tmp_path / "good.safetensors", "mae_jax")
    tensors = load_file(tmp_path / "good.safetensors")
    for name, value, message in (
        ("depth", None, "its metadata lacks depth"),
        ("image_size", "32", "image_size='32' must be height and width"),
        ("image_size", [32, 40], "encoder/pos_embed/table has shape"),
        ("patch", 0, "patch=0 must be an integer >= 1"),
        ("heads", "two", "heads='two' must be an integer"),
        ("layer_norm_eps", -1.0, "layer_norm_eps=-1.0 must be a number > 0"),
        ("crop", 0.0, "crop=0.0"),
        ("pool", "max", "pool='max' must be one of"),
        ("std", [0.0, 1.0, 1.0], "std="),
    ):
        facts = json.loads(found.info.to_json()) | {name: value}
        facts = {key: x for key, x in facts.items() if x is not None}
        save_file(tensors, tmp_path / "odd.safetensors", {"mae_jax": json.dumps(facts)})
        with pytest.raises(ConvertError) as raised:
            weights.read(tmp_path / "odd.safetensors")
        assert message in str(raised.value)


def test_odd_config_json(golden, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(golden / "hf/hf_tiny/pretrained_v4", folder)
    good = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 must be a number >= 0 and < 1"),
        ({"image_size": "32"}, "must be height and width"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps='1e-6' must be a number > 0"),
        ({"id2label": {"a": "cat"}}, "has invalid values"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    ):
        (folder / "config.json").write_text(json.dumps(good | changes))
        with pytest.raises(ConvertError, match=message):
            weights.read(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConvertError, match="is not a JSON object"):
        weights.read(folder)
    (folder / "config.json").write_text(json.dumps(good))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ConvertError, match="names model-2.safetensors, which does not exist"):
        weights.read(folder)
    index.write_text(json.dumps({"weight_map": {"a": 1}}))
    with pytest.raises(ConvertError, match="index.json has no weight_map"):
        weights.read(folder)


@pytest.mark.parametrize("dialect", ["hf", "timm"])
def test_a_directory_that_lost_its_last_blocks(golden, tmp_path, dialect):
    """Its tensors alone would make a whole, if shallower, model."""
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "d", dialect)
    file = tmp_path / "d" / "model.safetensors"
    tensors = load_file(file)  # without the metadata of ours, as others write it
    lost, key = dict(hf=("layer.1.", "num_hidden_layers"), timm=("blocks.1.", "depth"))[dialect]
    save_file({name: x for name, x in tensors.items() if lost not in name}, file)
    with pytest.raises(ConvertError, match=rf"config.json contradicts .* {key}=2 \(its tensors: 1"):
        weights.read(tmp_path / "d")


def test_sizes_of_config_json_that_are_not_those_of_the_tensors(golden, tmp_path):
    shutil.copytree(golden / "hf/hf_tiny/pretrained_v4", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    good = json.loads(path.read_text())
    for key in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "num_channels"),
        *("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_hidden_layers"),
    ):
        path.write_text(json.dumps(good | {key: 2 * good[key]}))
        with pytest.raises(ConvertError, match=f" {key}={2 * good[key]} .its tensors: {good[key]}"):
            weights.read(tmp_path / "hf")
    path.write_text(json.dumps(good | {"patch_size": [good["patch_size"]] * 2}))
    weights.read(tmp_path / "hf")


@pytest.mark.parametrize(("name", "value"), [("act_layer", "gelu_tanh"), ("no_embed_class", True)])
def test_arguments_of_timm_that_there_is_no_model_for(golden, tmp_path, name, value):
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "timm", "timm")
    path = tmp_path / "timm" / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"model_args": good["model_args"] | {name: value}}))
    with pytest.raises(ConvertError, match=f"model_args has {name}={value!r}"):
        weights.read(tmp_path / "timm")
    known = {"act_layer": "gelu", "no_embed_class": False}
    path.write_text(json.dumps(good | {"model_args": good["model_args"] | known}))
    weights.read(tmp_path / "timm")


def test_a_table_without_the_class_token_is_not_to_be_read_with_another_grid(golden, tmp_path):
    change = lambda tensors: tensors.update(pos_embed=tensors["pos_embed"][:, 1:])  # noqa: E731
    with pytest.raises(ConvertError, match=r"without a row for the cls token .* not supported"):
        weights.read(spoil(golden, tmp_path, change), **HEADS)


def test_preprocessor_config(golden, tmp_path):
    """One number for all channels, values that are not normalised, and what is neither."""
    shutil.copytree(golden / "hf/hf_tiny/pretrained_v4", tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    for content, mean, std in (
        ({"image_mean": 0.5, "image_std": 1}, 0.5, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, 0.0, 1.0),
    ):
        file.write_text(json.dumps(content))
        info = weights.read(tmp_path / "hf").info
        assert (info.mean, info.std) == ((mean,) * 3, (std,) * 3)
    file.write_text(json.dumps({"image_mean": None}))
    with pytest.raises(ConvertError, match="preprocessor_config.json has invalid values"):
        weights.read(tmp_path / "hf")


def test_tensors_that_are_no_floats(golden, tmp_path):
    change = lambda tensors: tensors.update({"norm.bias": np.zeros(32, np.int8)})  # noqa: E731
    with pytest.raises(ConvertError, match=r"not floating point: norm.bias \(int8\)"):
        weights.read(spoil(golden, tmp_path, change), **HEADS)


@pytest.mark.parametrize("types", [("bfloat16", "float16"), ("float32", "float16")])
def test_blocks_of_different_types(golden, tmp_path, types):
    """Our arrays hold all blocks, and to make them alike would change the bits of some."""
    first, other = map(jnp.dtype, types)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(other if "blocks.1.mlp.fc1" in name else first)

    path = spoil(golden, tmp_path, change)
    with pytest.raises(ConvertError) as raised:
        weights.read(path, **HEADS)
    assert str(raised.value).count("\n") == 2
    line = f"! blocks.1.mlp.fc1.bias is {other}, but blocks.0.mlp.fc1.bias is {first}: use one"
    assert line in str(raised.value)
    uneven = lambda tensors: tensors.update(  # noqa: E731
        {name: x.astype(np.float16) for name, x in tensors.items() if "mlp" in name}
    )
    weights.read(spoil(golden, tmp_path, uneven), **HEADS)


def test_a_stray_block_is_unexpected_and_does_not_make_the_others_missing(golden, tmp_path):
    change = lambda tensors: tensors.update(  # noqa: E731
        {"blocks.9.norm1.weight": np.zeros(32, np.float32)}
    )
    with pytest.raises(ConvertError) as raised:
        weights.read(spoil(golden, tmp_path, change), **HEADS)
    assert str(raised.value).count("\n") == 1
    assert "+ blocks.9.norm1.weight (32,) is not part of the model" in str(raised.value)


def test_another_dialect_s_directory_is_not_overwritten(golden, tmp_path):
    """Its old weights or config.json would be read together with the new ones."""
    found = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(found, tmp_path / "hf", "hf")
    weights.write(found, tmp_path / "hf", "hf", overwrite=True)
    with pytest.raises(ConvertError, match="also contains config.json, preprocessor_config.json"):
        weights.write(found, tmp_path / "hf", "mae_jax", overwrite=True)


def test_nan_is_named(golden, tmp_path, caplog):
    def change(tensors):
        tensors["norm.bias"][3] = np.nan

    with caplog.at_level(logging.WARNING):
        weights.read(spoil(golden, tmp_path, change), **HEADS)
    assert "NaN or Inf in encoder/norm/bias" in caplog.text


def test_destinations(golden, tmp_path):
    def write(path, **options):
        weights.write(weights.read(golden / OFFICIAL, **HEADS), path, "mae_jax", **options)

    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    write(file)
    write(folder)
    (folder / "mine.txt").write_text("kept")
    write(tmp_path / "B.SafeTensors")
    before = file.read_bytes()
    assert (tmp_path / "B.SafeTensors").read_bytes() == before
    for path in (file, folder):
        with pytest.raises(ConvertError, match="exists: choose another path, or replace it"):
            write(path)
        write(path, overwrite=True)
    assert file.read_bytes() == before
    assert (folder / "mine.txt").read_text() == "kept"
    with pytest.raises(ConvertError, match="exists and is a file"):
        weights.check_destination(tmp_path / "folder" / "mine.txt", "mae_jax", overwrite=True)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ConvertError, match="exists and is a directory"):
        write(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(ConvertError, match="cannot write"):
        write(tmp_path / "folder" / "mine.txt" / "x.safetensors")
    assert not list(tmp_path.rglob(".*"))


def test_what_a_dialect_cannot_hold(golden, tmp_path, caplog):
    gap = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    with pytest.raises(ConvertError, match=r"\(fc_norm\). as --to timm does"):
        weights.write(gap, tmp_path / "hf", "hf")
    with caplog.at_level(logging.WARNING):
        weights.write(
            weights.read(golden / OFFICIAL, layer_norm_eps=1e-12, **HEADS),
            tmp_path / "o.safetensors",
            "official",
        )
    assert "layer_norm_eps=1e-12, which official cannot store" in caplog.text
    assert weights.read(tmp_path / "o.safetensors").info.layer_norm_eps == 1e-12
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "hf", "hf")
    assert "config.json gets norm_pix_loss=false" in caplog.text


def test_reconstruction_without_a_decoder_or_a_known_target(golden):
    model, _ = mae_jax.load(golden / "timm/timm_tiny.state_dict.safetensors", heads=4)
    with pytest.raises(ConvertError, match="no decoder.*mae_pretrain_vit_base_full.pth"):
        model.task()
    model, _ = mae_jax.load(golden / OFFICIAL, **HEADS)
    with pytest.raises(ConvertError, match="--target pixels or normalized"):
        model.task()
    assert mae_jax.load(golden / OFFICIAL, target="pixels", **HEADS)[0].task().norm_pix is False


# ---------------------------------------------------------------- the command line


def test_inspect(golden, capsys):
    command.main(["inspect", str(golden / OFFICIAL)])
    table = capsys.readouterr().out
    for text in ("official", "heads unknown", "32 x 32 x 3", "unknown", "--target needed", "hf"):
        assert text in table


def test_convert_as_a_process(golden, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "mae_jax.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    source, out = golden / "hf/hf_tiny/pretrained_v5", tmp_path / "out.safetensors"
    made = run(source, out, "--to", "official")
    assert made.returncode == 0, made.stderr
    assert "layer_norm_eps=1e-12, which official cannot store" in made.stderr
    with safe_open(out, framework="numpy") as file:
        assert "decoder_blocks.0.attn.qkv.weight" in file.keys()  # noqa: SIM118
    again = run(source, out, "--to", "official")
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr


def test_predictions_do_not_depend_on_the_way_the_weights_came(golden, tmp_path):
    """One model's pictures, from its official file and from each dialect it was converted to."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    reading = dict(target="normalized", **HEADS)
    expected = None
    for to in ("official", "hf", "mae_jax"):
        path = tmp_path / f"{to}.safetensors"
        weights.write(weights.read(golden / OFFICIAL, **reading), path, to)
        model, params = mae_jax.load(path)
        picture = np.asarray(model.reconstruct(params, images))
        expected = picture if expected is None else expected
        np.testing.assert_array_equal(picture, expected)


def test_bfloat16_activations(golden):
    model, params = mae_jax.load(golden / "hf/hf_tiny/pretrained_v4", dtype="bfloat16")
    assert model.execution == ExecutionConfig(dtype=jnp.dtype("bfloat16"))
    assert params["encoder"]["cls_token"].dtype == jnp.float32
    assert make_autoencoder(model.info, model.execution).encoder.execution.dtype == jnp.bfloat16
    with pytest.raises(ConvertError, match="dtype='float64'"):
        mae_jax.load(golden / "hf/hf_tiny/pretrained_v4", dtype="float64")
