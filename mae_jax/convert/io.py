"""Read and write checkpoints on disk: files, directories of Hugging Face and timm, workdirs."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from mae_jax.convert import hf_timm, other_methods
from mae_jax.convert.hf_preprocessor import hf_preprocessor, parse_hf_preprocessor
from mae_jax.convert.model_info import REQUIRED, ConvertError, ModelInfo
from mae_jax.convert.weight_files import (
    SUFFIXES,
    RawCheckpoint,
    choose_weights,
    load_file,
    write_file,
)
from mae_jax.convert.workdir import find_checkpoints, load_run
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax")

SINGLE_FILE_SUFFIXES = (".safetensors", ".pth")  # any other name is a directory
# Added by torch.compile, DistributedDataParallel and Lightning.
KEY_PREFIXES = ("_orig_mod.", "module.", "model.", "_orig_mod.")
MODEL_TYPES = ("vit_mae", "vit", "pixio")  # of transformers
CONFIG_NAMES = {
    "mae_jax": (),
    "official": (),
    "pixio": (),
    "timm": ("config.json",),
    "hf": ("config.json", "preprocessor_config.json"),
}


def load(path: Path, *, ema: bool = False) -> RawCheckpoint:
    """Read a weights file, a directory with one, or the workdir of a run.

    Args:
      ema: read the EMA parameters of a run instead of the last ones.

    Raises:
      ConvertError: there is no checkpoint, or it is corrupt.
    """
    if not path.exists():
        raise ConvertError(f"{path} does not exist")
    if path.is_dir() and (checkpoints := find_checkpoints(path)) is not None:
        return RawCheckpoint(*load_run(*checkpoints, ema=ema))
    if ema:
        raise ConvertError(f"{path} is not a workdir of mae_jax: only these have EMA parameters")
    raw = _load_directory(path) if path.is_dir() else load_file(path)
    other_methods.read_mae_lite(raw, path)
    for prefix in KEY_PREFIXES:
        if all(name.startswith(prefix) for name in raw.tensors):
            raw.tensors = {n.removeprefix(prefix): x for n, x in raw.tensors.items()}
    other_methods.read_cross_mae(raw, path)
    other_methods.read_pixio_backbone(raw, path)
    return raw


def _load_directory(path: Path) -> RawCheckpoint:
    """Read the weights of a directory, and the config files of Hugging Face or timm."""
    raw = _load_weights(path)
    config = _read_json(path / "config.json")
    with _invalid_values(path / "config.json"):
        if "architecture" in config:
            _add_timm_metadata(raw, config)
        elif config.get("model_type") in MODEL_TYPES:
            _add_hf_metadata(raw, config, path)
    if config and config.get("model_type", "vit") not in MODEL_TYPES:
        log.warning(
            "%s is ignored: its model_type=%r is none of %s",
            path / "config.json",
            config.get("model_type"),
            ", ".join(MODEL_TYPES),
        )
    return raw


def _add_timm_metadata(raw: RawCheckpoint, config: dict[str, Any]) -> None:
    raw.dialect = "timm"
    raw.declared_sizes = hf_timm.declared_sizes(config.get("model_args", {}))
    info = _header_info(raw)
    if info is None or hf_timm.timm_config(info) != config:
        raw.metadata |= hf_timm.parse_timm_config(config)


def _add_hf_metadata(raw: RawCheckpoint, config: dict[str, Any], path: Path) -> None:
    """Add the metadata of config.json and of preprocessor_config.json.

    As transformers 5 does, prefer the "image_processor" of processor_config.json.
    """
    raw.declared_sizes = hf_timm.declared_sizes(config)
    declared = hf_timm.parse_hf_config(config)
    if config["model_type"] == "pixio":
        raw.metadata.setdefault("source", "pixio")
    if raw.metadata.get("target") == "unknown":  # config.json cannot express that
        declared.pop("target", None)
    info = _header_info(raw)
    file = path / "processor_config.json"
    preprocessor = _read_json(file).get("image_processor")
    if not isinstance(preprocessor, dict):
        file = path / "preprocessor_config.json"
        preprocessor = _read_json(file)
    if file.exists() and (info is None or hf_preprocessor(info) != preprocessor):
        with _invalid_values(file):
            channels, size = config.get("num_channels", 3), declared["image_size"]
            declared |= parse_hf_preprocessor(preprocessor, channels, size, file.name)
    raw.metadata |= declared


def _header_info(raw: RawCheckpoint) -> ModelInfo | None:
    """Return the metadata in the weights file itself, if it is complete.

    It may say more than unchanged config files do, such as how to resize images of 16 bits.
    """
    return ModelInfo(**raw.metadata) if raw.metadata.keys() >= REQUIRED else None


def _load_weights(path: Path) -> RawCheckpoint:
    """Read the weights of a directory: the files of Hugging Face, else the only weights file."""
    files = list_weight_files(path)
    chosen = choose_weights([file.name for file in path.iterdir() if file.is_file()])
    if chosen:
        return _load_shards(path / chosen) if chosen.endswith(".json") else load_file(path / chosen)
    if (path / "checkpoints").is_dir():
        raise ConvertError(f"{path} is a workdir without a checkpoint yet")
    hint = f" ({', '.join(files[:5])}): choose one" if files else ": choose a weights file"
    if not files and not path.is_absolute() and len(path.parts) == 2:
        hint += f"; hf://{path} is the model of the hub, which this folder hides"
    raise ConvertError(f"{path} is not a workdir and has {len(files) or 'no'} weights files{hint}")


def list_weight_files(path: Path) -> list[str]:
    """Return the names of the weights files in a directory, by their suffixes."""
    return sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)


def _load_shards(index: Path) -> RawCheckpoint:
    """Read a sharded checkpoint of Hugging Face."""
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConvertError(f"{index} has no weight_map from tensors to files")
    shards = [index.parent / name for name in sorted(set(files.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ConvertError(f"{index} names {shard.name}, which does not exist")
    raw = RawCheckpoint({})
    for part in map(load_file, shards):
        raw.tensors |= part.tensors
        raw.metadata |= part.metadata
    if missing := [f"{name} ({file})" for name, file in files.items() if name not in raw.tensors]:
        raise ConvertError(f"{index} names tensors that its files lack: {', '.join(missing)}")
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} is not a JSON object, but a {type(content).__name__}")
    return content


@contextmanager
def _invalid_values(file: Path) -> Iterator[None]:
    """Raise ConvertError for values of an unexpected type; `ModelInfo` checks the rest."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConvertError(f"{file} has invalid values: {error}") from error


def single_file_suffix(path: Path) -> str:
    """Return the lower-case suffix of a single file to write; "" for a directory."""
    suffix = path.suffix.lower()
    return suffix if suffix in SINGLE_FILE_SUFFIXES else ""


def save(path: Path, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo) -> None:
    """Write one file, or a directory if the name does not end in a suffix of weights files.

    Raises:
      ConvertError: the file cannot be written.
    """
    try:
        with atomic_path(path) as part:
            if suffix := single_file_suffix(path):
                write_file(part, suffix, dialect, tensors, info)
            else:
                _write_directory(part, dialect, tensors, info)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch: RuntimeError if disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise ConvertError(f"cannot write {path}: {reason}") from error


def _write_directory(
    path: Path, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo
) -> None:
    path.mkdir()
    name = weights_name(dialect)
    write_file(path / name, Path(name).suffix, dialect, tensors, info)
    for file, content in zip(CONFIG_NAMES[dialect], _configs(dialect, info)):
        (path / file).write_text(json.dumps(content, indent=2) + "\n")


def weights_name(dialect: str) -> str:
    """Return the name of the weights file in a directory; official code needs torch.save."""
    return "checkpoint.pth" if dialect in ("official", "pixio") else "model.safetensors"


def _configs(dialect: str, info: ModelInfo) -> list[dict[str, Any]]:
    """Return the contents of the files in CONFIG_NAMES."""
    if dialect == "hf":
        return [hf_timm.hf_config(info), hf_preprocessor(info)]
    return [hf_timm.timm_config(info)] if dialect == "timm" else []
