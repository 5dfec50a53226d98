"""Pixio's weights: official files, PixioModel directories of three layouts, and their outputs."""

import gzip
import json

import jax
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL, assert_close, assert_same
from PIL import Image
from safetensors.numpy import load_file, save_file

import mae_jax
from configs import attentive, finetune, knn, linprobe, pretrain, segment
from mae_jax import features
from mae_jax.convert import __main__ as command
from mae_jax.convert import push, weights
from mae_jax.convert.detect import detect
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.weight_files import RawCheckpoint
from mae_jax.distributed.sharding import make_mesh
from mae_jax.evaluate import __main__ as evaluate
from mae_jax.evaluate import similar
from mae_jax.models.variants import VARIANTS
from mae_jax.train.build_model import make_task
from mae_jax.train.config import from_config_dict
from mae_jax.train.warm_start import load_init_weights

FILES = "pixio/checkpoints"
ENCODER = f"{FILES}/official_encoder.safetensors"
HF = ("hf_v5.0.0", "hf_v5.24.0_fresh", "hf_v5.24.0_in_memory_names")
SIZES = ((32, 32), (48, 48), (40, 56), (24, 24))


@pytest.fixture
def encoder(golden):
    return weights.read(golden / ENCODER, heads=2)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("file", "dialect"),
    [
        ("official_encoder", "pixio"),
        ("official_pretrain_full", "pixio"),
        ("hf_pixio_v5.0.0", "hf"),
        ("hf_pixio_v5.24.0", "hf"),
    ],
)
def test_keys_and_shapes_of_every_size(golden, tmp_path, file, dialect):
    path = golden / "pixio/conversions" / f"{file}.json.gz"
    content = json.loads(gzip.decompress(path.read_bytes()))
    del content["note"]
    for name, value in content.items():
        variant = next(v for v in VARIANTS if v.replace("_", "") in name)
        expected = VARIANTS[variant]
        state_dicts = [value[key] for key in ("keys", "in_memory", "saved_fresh") if key in value]
        assert state_dicts
        for shapes in state_dicts:
            tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
            layout, info, params = detect(RawCheckpoint(tensors), tmp_path)
            assert (layout.dialect, info.source, info.class_tokens) == (dialect, "pixio", 8)
            assert (info.size_name, info.heads) == (variant, expected.heads)
            assert (info.image_size, info.layer_norm_eps) == ((256, 256), 1e-6)
            full = "full" in file
            assert (info.decoder_depth, info.decoder_heads) == ((32, 16) if full else (0, 0))
            if "parameters" in value:
                assert sum(map(np.prod, params.values())) == value["parameters"]


@pytest.mark.parametrize("folder", HF)
def test_every_layout_of_transformers_has_the_official_weights(golden, encoder, folder):
    read = weights.read(golden / FILES / folder)
    assert_same(read.arrays, encoder.arrays)
    assert (read.info.heads, read.info.class_tokens, read.info.resize) == (2, 4, "squash")


@pytest.mark.parametrize("folder", HF)
def test_a_file_of_transformers_without_its_config(golden, encoder, folder):
    """Its epsilon is 1e-6: that of transformers' other models would be 1e-12."""
    read = weights.read(golden / FILES / folder / "model.safetensors", heads=2)
    assert_same(read.arrays, encoder.arrays)
    assert read.info.layer_norm_eps == 1e-6


@pytest.mark.parametrize("name", ["mlp.fc1", "intermediate.dense"])
def test_an_incomplete_layout_is_refused(golden, tmp_path, name):
    folder = HF[0] if name == "mlp.fc1" else HF[1]
    tensors = load_file(golden / FILES / folder / "model.safetensors")
    tensors["encoder.layer.1.mlp.other.weight"] = tensors.pop(f"encoder.layer.1.{name}.weight")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConvertError) as raised:
        weights.read(tmp_path / "a.safetensors", heads=2)
    assert f"- encoder.layer.1.{name}.weight (64, 16) is missing" in str(raised.value)
    assert "+ encoder.layer.1.mlp.other.weight" in str(raised.value)


def test_round_trips_are_byte_identical(golden, tmp_path, encoder):
    """Directories are in the layout that every version of transformers reads."""
    official, hub = (
        load_file(golden / ENCODER),
        load_file(golden / FILES / HF[0] / "model.safetensors"),
    )
    weights.write(encoder, tmp_path / "hf", "hf")
    assert_same(load_file(tmp_path / "hf/model.safetensors"), hub)
    for folder in (tmp_path / "hf", *(golden / FILES / name for name in HF)):
        back = tmp_path / f"{folder.name}.safetensors"
        weights.write(weights.read(folder), back, "pixio")
        assert_same(load_file(back), official)
    assert weights.read(tmp_path / "hf").info == encoder.info
    weights.write(encoder, tmp_path / "ours.safetensors", "mae_jax")
    ours = weights.read(tmp_path / "ours.safetensors")
    assert_same(ours.arrays, encoder.arrays)
    assert ours.info == encoder.info


def test_config_json_is_that_of_transformers(golden, tmp_path, encoder):
    weights.write(encoder, tmp_path / "hf", "hf")
    written = json.loads((tmp_path / "hf/config.json").read_text())
    recorded = json.loads((golden / FILES / HF[0] / "config.json").read_text())
    derived = {"dtype", "out_features", "out_indices", "stage_names", "transformers_version"}
    assert written == {name: x for name, x in recorded.items() if name not in derived}
    assert type(written["mlp_ratio"]) is int  # transformers checks the type
    processor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert (processor["resample"], processor["crop_size"]) == (3, {"height": 32, "width": 32})


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [("n_cls_tokens", 8, 4), ("mlp_ratio", 3, 4), ("num_hidden_layers", 3, 2)],
)
def test_a_config_that_contradicts_the_weights(golden, tmp_path, key, value, shown):
    source = golden / FILES / HF[0]
    config = json.loads((source / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(ConvertError, match=rf"contradicts.*{key}={value} \(its tensors: {shown}"):
        weights.read(tmp_path)


def test_one_class_token_is_told_from_mae_by_its_config(golden, tmp_path):
    """Names and shapes in memory are those of ViTMAEModel."""
    source = golden / FILES / HF[2]
    config = json.loads((source / "config.json").read_text()) | {"n_cls_tokens": 1}
    tensors = load_file(source / "model.safetensors")
    names = ("embeddings.cls_token", "embeddings.position_embeddings")
    tensors |= {
        name: np.ascontiguousarray(tensors[name][:, -n:]) for name, n in zip(names, (1, 17))
    }
    (tmp_path / "pixio").mkdir()
    (tmp_path / "pixio/config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "pixio/model.safetensors")
    read = weights.read(tmp_path / "pixio")
    assert (read.info.is_pixio, read.info.class_tokens) == (True, 1)
    weights.write(read, tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "pixio"
    assert weights.read(tmp_path / "back").info == read.info
    assert not weights.read(tmp_path / "pixio/model.safetensors", heads=2).info.is_pixio


def test_backbone_of_transformers(golden, tmp_path, encoder, caplog):
    """Its own norm is the one of its feature maps; that of the model inside has no influence."""
    tensors = load_file(golden / FILES / HF[2] / "model.safetensors")
    norm = {name: x for name, x in tensors.items() if name.startswith("layernorm.")}
    for prefix in ("encoder.", "pixio."):
        wrapped = {f"{prefix}{name}": x for name, x in tensors.items()}
        save_file(wrapped | norm, tmp_path / "backbone.safetensors")
        read = weights.read(tmp_path / "backbone.safetensors", heads=2)
        assert_same(read.arrays, encoder.arrays)
    assert "left out" not in caplog.text
    other = {name: x + 1 for name, x in norm.items()}
    save_file(wrapped | other, tmp_path / "backbone.safetensors")
    read = weights.read(tmp_path / "backbone.safetensors", heads=2)
    np.testing.assert_array_equal(read.arrays["encoder/norm/scale"], other["layernorm.weight"])
    assert "left out pixio.layernorm.bias, pixio.layernorm.weight" in caplog.text


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("size", SIZES)
def test_features_at_every_size(golden, size):
    io = load_file(golden / FILES / "io.safetensors")
    pooler = load_file(golden / FILES / "hf_outputs.safetensors")
    name = f"{size[0]}x{size[1]}"
    images = np.moveaxis(io[f"{name}_images_u8"], 1, -1)
    model, params = mae_jax.load(golden / ENCODER, heads=2, image_size=size)
    outputs = jax.jit(lambda p, x: model.features(p, x, layers=(1,), grid=True))(params, images)
    tokens = io[f"{name}_tokens_norm"]
    assert_close(outputs["class_tokens"], tokens[:, :4])
    assert_close(outputs["grid"], tokens[:, 4:].reshape(outputs["grid"].shape))
    assert_close(outputs["mean"], tokens[:, 4:].mean(axis=1))
    assert_close(outputs["global"], io[f"{name}_global_feature"])
    assert_close(outputs["cls"], pooler[f"{name}_pooler_output"])
    if size == (32, 32):
        assert_close(outputs["class_tokens_1"], io["32x32_block0_tokens_norm"][:, :4])
        assert_close(outputs["grid_1"].reshape(2, 16, 16), io["32x32_block0_tokens_norm"][:, 4:])


def test_attention_maps_have_one_value_per_patch(golden):
    model, params = mae_jax.load(golden / ENCODER, heads=2)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    outputs = model.features(params, images, attention=True, attention_blocks=(1,))
    assert outputs["attention"].shape == (1, 4, 4)
    assert outputs["attention_1"].shape == (1, 2, 4, 4)


def test_pretraining_weights_reconstruct(golden):
    path = golden / FILES / "pretrain_latest_model.safetensors"
    model, params = mae_jax.load(path, heads=2, decoder_heads=2, target="normalized")
    assert (model.info.class_tokens, model.info.mask_cell) == (2, 4)  # of its recipe
    other, _ = mae_jax.load(path, heads=2, decoder_heads=2, target="normalized", image_size=40)
    with pytest.raises(
        ConvertError, match="use --image-size with multiples of 32, or --mask block"
    ):
        other.task()
    images = np.zeros((1, 64, 64, 3), np.uint8)
    model, params = mae_jax.load(path, heads=2, decoder_heads=2, target="normalized", image_size=64)
    assert model.task().mask_cell == 4
    assert model.task(mask="block").mask_cell == 1
    assert model.reconstruct(params, images).shape == images.shape


def test_commands_use_all_class_tokens(golden, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 2)):
        for label in ("dark", "light"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                low = 128 * (label == "light")
                pixels = rng.integers(low, low + 128, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{i}.png")
    checkpoint = ["--checkpoint", str(golden / FILES / HF[0])]
    out = tmp_path / "f.npz"
    features.main([str(tmp_path / "train"), *checkpoint, "--out", str(out)])
    with np.load(out) as arrays:
        assert {n: arrays[n].shape for n in arrays if n != "files"} == {
            "cls": (12, 16),
            "mean": (12, 16),
            "global": (12, 16),
            "class_tokens": (12, 4, 16),
        }
    report = tmp_path / "r.json"
    argv = [*checkpoint, "--data", str(tmp_path), "--suite", "knn,rankme", "--out", str(report)]
    evaluate.main(argv)
    rows = json.loads(report.read_text())["results"]
    assert {row["features"] for row in rows} == {"global", "mean", "cls"}
    argv = ["--among", str(tmp_path / "train"), "--duplicates", "0.5", "--features", "global"]
    similar.main([*argv, *checkpoint, "--csv", str(tmp_path / "d.csv")])
    mae = ["--checkpoint", str(golden / OFFICIAL), "--num-heads", "2"]
    with pytest.raises(ConvertError, match="has one class token: 'global' is of models with sev"):
        similar.main([*argv, *mae, "--csv", str(tmp_path / "e.csv")])


# ---------------------------------------------------------------- warm starts

MODEL = dict(image_size=(32, 32), patch=8, width=16, depth=2, heads=2, position="learned")


def warm_start(recipe, path, classes=("a", "b"), **changes):
    config = recipe.get_config()
    config.init.update(path=str(path), **changes.pop("init", {}))
    config.model.update(MODEL | changes)
    config = from_config_dict(config)
    task = make_task(config, make_mesh(), classes)
    arrays = jax.eval_shape(task.init, jax.random.key(0))
    return load_init_weights(config, task, arrays, classes)


@pytest.mark.parametrize("recipe", [finetune, linprobe, knn, attentive, segment])
def test_the_encoder_starts_every_downstream_task(golden, encoder, recipe):
    start = warm_start(recipe, golden / FILES / HF[0], class_tokens=4)
    kept = {name for name in encoder.arrays if recipe is not finetune or "encoder/norm" not in name}
    assert set(start.loaded) == kept
    np.testing.assert_array_equal(
        start.params["encoder"]["cls_token"], encoder.arrays["encoder/cls_token"]
    )
    with pytest.raises(
        ConvertError, match=r"has 4 class tokens, this model 1: set --config.model."
    ):
        warm_start(recipe, golden / FILES / HF[0])


def test_pretraining_continues_from_an_encoder(golden, encoder):
    """The decoder is fresh, and a larger image interpolates the positions."""
    path, init = golden / FILES / HF[0], {"encoder_only": True}
    start = warm_start(pretrain, path, class_tokens=4, init=init, image_size=(64, 64))
    assert set(start.loaded) == encoder.arrays.keys()
    assert {name.split("/")[0] for name in start.missing} == {"decoder"}
    assert start.params["encoder"]["pos_embed"]["table"].shape == (1, 68, 16)
    with pytest.raises(ConvertError, match=r"not the sine-cosine table.*model.position=learned"):
        warm_start(pretrain, path, class_tokens=4, init=init, position="sincos")


# ---------------------------------------------------------------- formats without Pixio


def test_formats_that_lack_a_part(golden, tmp_path, encoder, caplog):
    for dialect in ("official", "timm"):
        with pytest.raises(ConvertError, match=f"{dialect} has one class token, not 4: --to pixio"):
            weights.write(encoder, tmp_path / dialect, dialect)
    mae = weights.read(golden / OFFICIAL, **HEADS)
    with pytest.raises(ConvertError, match="--to official is for MAE"):
        weights.write(mae, tmp_path / "pixio", "pixio")
    assert weights.compatible_formats(encoder.info) == ["mae_jax", "hf", "pixio"]
    full = golden / FILES / "pretrain_latest_model.safetensors"
    heads = dict(heads=2, decoder_heads=2)
    weights.write(weights.read(full, **heads), tmp_path / "full.safetensors", "pixio")
    assert_same(load_file(tmp_path / "full.safetensors"), load_file(full))
    weights.write(weights.read(full, **heads), tmp_path / "hf", "hf")
    assert "transformers' PixioModel has no decoder" in caplog.text
    assert weights.read(tmp_path / "hf").info.decoder_depth == 0


def test_inspect(golden, capsys):
    command.main(["inspect", str(golden / FILES / HF[0])])
    table = capsys.readouterr().out
    for text in ("hf (Pixio)", "class tokens", "mean of the class tokens", "mae_jax, hf, pixio"):
        assert text in table


def test_push(golden, tmp_path):
    out = tmp_path / "hub"
    push.main([str(golden / ENCODER), "me/pixio", "--out", str(out), "--num-heads", "2"])
    card = (out / "README.md").read_text()
    assert '"pixio"' in card
    assert "4 class tokens" in card
    assert "--to timm" not in card
    assert weights.read(out).info.class_tokens == 4


# ---------------------------------------------------------------- CrossMAE and MAE-Lite


def test_cross_mae(golden, tmp_path, caplog):
    """Its decoder attends to the encoder's blocks, and the encoder has no final norm."""
    expected = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    tensors = {
        name: x
        for name, x in load_file(golden / OFFICIAL).items()
        if not name.startswith(("decoder_blocks", "decoder_embed", "norm."))
    }
    tensors |= {
        "decoder_blocks.0.cross_attn.q.weight": np.zeros((32, 32), np.float32),
        "decoder_blocks.11.cross_attn.kv.weight": np.zeros((64, 32), np.float32),
        "wfm.linear.weight": np.zeros((12, 3), np.float32),
        "dec_norms.0.weight": np.zeros(32, np.float32),
    }
    save_file(tensors, tmp_path / "cross.safetensors")
    read = weights.read(tmp_path / "cross.safetensors", heads=2)
    norm = {
        "encoder/norm/scale": np.ones(32, np.float32),
        "encoder/norm/bias": np.zeros(32, np.float32),
    }
    assert_same(read.arrays, expected.arrays | norm)
    for name in ("decoder_blocks.*.cross_attn.q.weight", "decoder_pos_embed", "dec_norms.*.weight"):
        assert name in caplog.text
    assert "no final norm: it gets one of scale 1 and bias 0" in caplog.text

    tensors["extra.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "cross.safetensors")
    with pytest.raises(ConvertError, match=r"\+ extra.weight \(3,\) is not part of the model"):
        weights.read(tmp_path / "cross.safetensors", heads=2)


def lite(arrays):
    return {f"module.model.{name}": x for name, x in arrays.items()}


def test_mae_lite(golden, tmp_path, caplog):
    """With distillation it contains the teacher; anything else is refused."""
    tensors = lite(load_file(golden / OFFICIAL))
    tensors |= {
        "module.tch_model.blocks.0.norm1.weight": np.zeros(64, np.float32),
        "module.attn_adapter.adapter11.weight": np.zeros((12, 2, 1, 1), np.float32),
    }
    save_file(tensors, tmp_path / "lite.safetensors")
    read = weights.read(tmp_path / "lite.safetensors", **HEADS)
    assert_same(read.arrays, weights.read(golden / OFFICIAL, **HEADS).arrays)
    assert "left out module.attn_adapter.adapter11.weight, module.tch_model.blocks.*" in caplog.text
    save_file(tensors | {"module.other": np.zeros(1, np.float32)}, tmp_path / "lite.safetensors")
    with pytest.raises(ConvertError, match=r"\+ module\.other \(1,\)"):
        weights.read(tmp_path / "lite.safetensors", **HEADS)


@pytest.mark.parametrize(("width", "decoder_width", "decoder_heads"), [(192, 96, 3), (384, 192, 6)])
def test_attention_heads_of_mae_lite(tmp_path, caplog, width, decoder_width, decoder_heads):
    """They are 12, where the standard sizes of these widths have 3 and 6."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "norm.weight": (width,)}
    shapes |= {"mask_token": (1, 1, decoder_width), "decoder_blocks.0.norm1.bias": (decoder_width,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(lite(tensors), tmp_path / "lite.safetensors")
    raw = weights.io.load(tmp_path / "lite.safetensors")
    assert raw.metadata == {"heads": 12, "decoder_heads": decoder_heads}
    del tensors["mask_token"], tensors["decoder_blocks.0.norm1.bias"]
    save_file(lite(tensors), tmp_path / "lite.safetensors")
    assert weights.io.load(tmp_path / "lite.safetensors").metadata == {}
    assert "set --num-heads 12" in caplog.text
