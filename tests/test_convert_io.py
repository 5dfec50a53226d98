"""Files and directories of checkpoints: corrupt ones, their JSON files, and destinations."""

import json
import shutil

import pytest
from convert_helpers import HEADS, OFFICIAL, assert_same
from safetensors.numpy import load_file, save_file

from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError

TINY = "hf/hf_tiny/pretrained_v4"


@pytest.fixture
def huggingface(golden, tmp_path):
    """A copy of a directory of Hugging Face."""
    shutil.copytree(golden / TINY, tmp_path / "hf")
    return tmp_path / "hf"


def test_corrupt_files(golden, tmp_path):
    official = (golden / OFFICIAL).read_bytes()
    (tmp_path / "empty").mkdir()
    for name, content, message in (
        ("truncated.safetensors", official[: len(official) // 2], "truncated, corrupt or not"),
        ("text.safetensors", b"hello", "truncated, corrupt or not"),
        ("empty.safetensors", b"", "is empty"),
        ("zip.safetensors", b"PK\x03\x04" + b"0" * 100, "or a zip: rename it to .pth"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("readme.txt", b"hello", "is not a checkpoint: its name"),
        ("nowhere.safetensors", None, "does not exist"),
        ("empty", None, "is not a workdir and has no weights files"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvertError, match=f"{name}.* {message}"):
            weights.read(tmp_path / name)


def test_sharded_directory(golden, tmp_path):
    source = golden / TINY
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert_same(weights.read(tmp_path).arrays, weights.read(source).arrays)
    save_file({name: tensors[name] for name in names[1:-2:2]}, tmp_path / file)
    with pytest.raises(ConvertError, match=rf"that its files lack: {names[-1]} \({file}\)$"):
        weights.read(tmp_path)


def test_invalid_index_of_shards(huggingface):
    (huggingface / "model.safetensors").rename(huggingface / "model-1.safetensors")
    index = huggingface / "model.safetensors.index.json"
    for file, message in (
        ("model-2.safetensors", "names model-2.safetensors, which does not exist"),
        (1, "index.json has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(ConvertError, match=message):
            weights.read(huggingface)


def test_invalid_config_json(huggingface):
    path = huggingface / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 must be a number >= 0 and < 1"),
        ({"image_size": "32"}, "must be height and width"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps='1e-6' must be a number > 0"),
        ({"id2label": {"a": "cat"}}, "id2label must be an object of names by class number"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ConvertError, match=message):
            weights.read(huggingface)
    path.write_text("[]")
    with pytest.raises(ConvertError, match="is not a JSON object"):
        weights.read(huggingface)


@pytest.mark.parametrize(
    ("dialect", "lost", "key"), [("hf", "layer.1.", "num_hidden_layers"), ("timm", "s.1.", "depth")]
)
def test_lost_last_block_contradicts_config_json(golden, tmp_path, dialect, lost, key):
    """The tensors alone would make a valid, shallower model."""
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "d", dialect)
    file = tmp_path / "d" / "model.safetensors"
    tensors = load_file(file)  # without our metadata, as other programs write it
    save_file({name: x for name, x in tensors.items() if lost not in name}, file)
    with pytest.raises(ConvertError, match=rf"config.json contradicts .* {key}=2 \(its tensors: 1"):
        weights.read(tmp_path / "d")


def test_sizes_in_config_json_contradict_the_tensors(huggingface):
    path = huggingface / "config.json"
    config = json.loads(path.read_text())
    for key in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "num_channels"),
        *("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_hidden_layers"),
    ):
        path.write_text(json.dumps(config | {key: 2 * config[key]}))
        message = f" {key}={2 * config[key]} .its tensors: {config[key]}"
        with pytest.raises(ConvertError, match=message):
            weights.read(huggingface)
    path.write_text(json.dumps(config | {"patch_size": [config["patch_size"]] * 2}))
    weights.read(huggingface)


def test_unsupported_arguments_of_timm(golden, tmp_path):
    weights.write(weights.read(golden / OFFICIAL, **HEADS), tmp_path / "timm", "timm")
    path = tmp_path / "timm" / "config.json"
    config = json.loads(path.read_text())
    for name, value in (("act_layer", "gelu_tanh"), ("no_embed_class", True)):
        path.write_text(json.dumps(config | {"model_args": config["model_args"] | {name: value}}))
        with pytest.raises(ConvertError, match=f"model_args has {name}={value!r}"):
            weights.read(tmp_path / "timm")
    supported = config["model_args"] | {"act_layer": "gelu", "no_embed_class": False}
    path.write_text(json.dumps(config | {"model_args": supported}))
    weights.read(tmp_path / "timm")


def test_preprocessor_config(huggingface):
    """One number for all channels, disabled normalization, and invalid values."""
    path = huggingface / "preprocessor_config.json"
    for content, mean, std in (
        ({"image_mean": 0.5, "image_std": 1}, 0.5, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": False}, 0.0, 1.0),
    ):
        path.write_text(json.dumps(content))
        info = weights.read(huggingface).info
        assert (info.mean, info.std) == ((mean,) * 3, (std,) * 3)
    path.write_text(json.dumps({"image_mean": "0.5"}))
    with pytest.raises(ConvertError, match="preprocessor_config.json: image_mean='0.5' must be"):
        weights.read(huggingface)


def test_processor_config_is_preferred_as_in_transformers(huggingface):
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": 0.1, "resample": 2.0}
    path = huggingface / "processor_config.json"
    path.write_text(json.dumps({"image_processor": processor}))
    info = weights.read(huggingface).info
    assert (info.mean, info.interpolation) == ((0.1,) * 3, "bilinear")
    path.write_text(json.dumps({"image_processor": processor | {"resample": 9}}))
    with pytest.raises(ConvertError, match="^processor_config.json: resample=9 must be"):
        weights.read(huggingface)


# ---------------------------------------------------------------- destinations


def test_directory_of_another_format_is_not_overwritten(golden, tmp_path):
    """Its old weights or config.json would be read with the new ones."""
    checkpoint = weights.read(golden / OFFICIAL, **HEADS)
    weights.write(checkpoint, tmp_path / "hf", "hf")
    weights.write(checkpoint, tmp_path / "hf", "hf", overwrite=True)
    with pytest.raises(ConvertError, match="also contains config.json, preprocessor_config.json"):
        weights.write(checkpoint, tmp_path / "hf", "mae_jax", overwrite=True)


def test_destinations(golden, tmp_path):
    checkpoint = weights.read(golden / OFFICIAL, **HEADS)

    def write(path, **options):
        weights.write(checkpoint, path, "mae_jax", **options)

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
        weights.check_destination(folder / "mine.txt", "mae_jax", overwrite=True)
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ConvertError, match="exists and is a directory"):
        write(tmp_path / "b.safetensors", overwrite=True)
    with pytest.raises(ConvertError, match="mine.txt is a file, not a directory"):
        write(folder / "mine.txt" / "x.safetensors")
    assert not list(tmp_path.rglob(".*"))
