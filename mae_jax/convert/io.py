"""Tensors and facts in files and directories, under whatever names they have there."""

import argparse
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mae_jax.convert import hf_timm, torch_io
from mae_jax.convert.model_info import ConvertError, ModelInfo, metadata_from_json
from mae_jax.convert.workdir import load_run, run_steps
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax")

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SINGLE_FILE_SUFFIXES = (".safetensors", ".pth")  # any other name is a directory
# Of torch.compile, DistributedDataParallel, Lightning.
KEY_PREFIXES = ("_orig_mod.", "module.", "model.", "_orig_mod.")
METADATA = "mae_jax"  # the key of an Info in JSON, in safetensors headers and beside "model"


@dataclass
class RawCheckpoint:
    """tensors: by their own names; facts: fields of an `Info` that are told beside them.

    dialect: where something beside the tensors tells it.
    sizes: as config.json tells them, which have to be those of the tensors.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)
    dialect: str | None = None
    declared_sizes: dict[str, Any] = field(default_factory=dict)


def load(path: Path, *, ema: bool = False) -> RawCheckpoint:
    """Everything in a weights file, a directory with one, or a run of ours.

    Args:
      ema: of a run, the average of the parameters instead of the last ones.

    Raises:
      ConvertError: there is nothing of the kind, or it is damaged.
    """
    if not path.exists():
        raise ConvertError(f"{path} does not exist")
    if path.is_dir() and (steps := run_steps(path)) is not None:
        return RawCheckpoint(*load_run(*steps, ema=ema))
    if ema:
        raise ConvertError(f"{path} is no run of mae_jax: only those keep an average apart")
    found = _load_directory(path) if path.is_dir() else _load_file(path)
    for prefix in KEY_PREFIXES:
        if all(name.startswith(prefix) for name in found.tensors):
            found.tensors = {n.removeprefix(prefix): x for n, x in found.tensors.items()}
    return found


def _load_file(path: Path) -> RawCheckpoint:
    suffix = path.suffix.lower()
    if suffix in (".safetensors", *TORCH_SUFFIXES):
        _check_magic_bytes(path, suffix)
        return _load_safetensors(path) if suffix == ".safetensors" else _load_torch(path)
    raise ConvertError(
        f"{path} is not a checkpoint by its name: .safetensors, {', '.join(TORCH_SUFFIXES)} "
        "are read, and directories"
    )


def _check_magic_bytes(path: Path, suffix: str) -> None:
    """ConvertError where the first bytes show that a file is not what its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror}") from error
    is_torch = head.startswith((b"PK\x03\x04", b"\x80"))
    if not head:
        raise ConvertError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path} is a pointer of git-lfs, not the file itself: git lfs pull")
    if is_torch and suffix == ".safetensors" and head[8:9] != b"{":
        raise ConvertError(f"{path} is a file of torch.save or a zip: name it .pth")
    if not is_torch and suffix != ".safetensors":
        raise ConvertError(f"{path} is not a checkpoint: torch.save writes nothing like it")


def _load_safetensors(path: Path) -> RawCheckpoint:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConvertError(f"{path} is truncated, damaged or no checkpoint: {error}") from error
    except (TypeError, AttributeError) as error:  # safetensors looks the type up in numpy
        raise ConvertError(f"{path} holds tensors of a type that numpy lacks: {error}") from error
    facts = metadata_from_json(metadata[METADATA], str(path)) if METADATA in metadata else {}
    return RawCheckpoint(tensors, facts)


def _load_torch(path: Path) -> RawCheckpoint:
    tensors, rest = torch_io.load(path)
    facts = _metadata_from_filename(path)
    arguments = rest.get("args")
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if isinstance(arguments, dict):
        facts |= _metadata_from_args(arguments)
    if isinstance(rest.get(METADATA), str):
        facts |= metadata_from_json(rest.pop(METADATA), str(path))
    if rest:
        log.info("left behind in %s: %s", path.name, ", ".join(map(str, rest)))
    return RawCheckpoint(tensors, facts)


def _metadata_from_args(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the command line of an official training run tells."""
    facts = {}
    if "norm_pix_loss" in arguments:
        facts["target"] = "normalized" if arguments["norm_pix_loss"] else "pixels"
    if "mask_ratio" in arguments:
        facts["mask_ratio"] = arguments["mask_ratio"]
    return facts


def _metadata_from_filename(path: Path) -> dict[str, Any]:
    """The target kinds of the official files, which nothing inside them tells."""
    if re.match(r"mae_visualize_vit_\w+", path.name):
        return {"target": "pixels"}
    if re.match(r"mae_pretrain_vit_\w+_full", path.name):
        return {"target": "normalized"}
    return {}


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


def _load_directory(path: Path) -> RawCheckpoint:
    found = _load_weights(path)
    config = _read_json(path / "config.json")
    with _invalid_values(path / "config.json"):
        if "architecture" in config:
            found.dialect = "timm"
            found.metadata |= hf_timm.parse_timm_config(config)
            found.declared_sizes = hf_timm.declared_sizes(config.get("model_args", {}))
        elif config.get("model_type") in ("vit_mae", "vit"):
            told = hf_timm.parse_hf_config(config)
            if found.metadata.get("target") == "unknown":  # which config.json cannot say
                told.pop("target", None)
            found.metadata |= told
            found.declared_sizes = hf_timm.declared_sizes(config)
            with _invalid_values(path / "preprocessor_config.json"):
                preprocessor = _read_json(path / "preprocessor_config.json")
                channels = config.get("num_channels", 3)
                found.metadata |= hf_timm.parse_hf_preprocessor(preprocessor, channels)
    if config and config.get("model_type", "vit") not in ("vit_mae", "vit"):
        log.warning(
            "%s says model_type=%r, which is neither vit_mae nor vit; it is not used",
            path / "config.json",
            config.get("model_type"),
        )
    return found


@contextmanager
def _invalid_values(file: Path) -> Iterator[None]:
    """Values may be of any type; what they tell is checked once more as an Info."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConvertError(f"{file} holds odd values: {error}") from error


def _load_weights(path: Path) -> RawCheckpoint:
    """A directory's weights: in files that HuggingFace names so, or in its only one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _load_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            return _load_shards(index)
    if (path / "checkpoints").is_dir():
        raise ConvertError(f"{path} is a run without a checkpoint yet")
    found = list_weight_files(path)
    if len(found) == 1:
        return _load_file(path / found[0])
    named = f" ({', '.join(found[:5])}): name one of them" if found else ": name a weights file"
    raise ConvertError(f"{path} is no run and holds {len(found) or 'no'} weights files{named}")


def list_weight_files(path: Path) -> list[str]:
    """Names of the files in a directory that hold weights, by their suffixes."""
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    return sorted(file.name for file in path.iterdir() if file.suffix.lower() in suffixes)


def _load_shards(index: Path) -> RawCheckpoint:
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConvertError(f"{index} has no weight_map: it does not say where the tensors are")
    shards = [index.parent / name for name in sorted(set(files.values()))]
    for shard in shards:
        if not shard.is_file():
            raise ConvertError(f"{index} names {shard.name}, which is not there")
    found = RawCheckpoint({})
    for part in map(_load_file, shards):
        found.tensors |= part.tensors
        found.metadata |= part.metadata
    if lacking := [f"{name} ({file})" for name, file in files.items() if name not in found.tensors]:
        raise ConvertError(f"{index} names tensors that its files lack: {', '.join(lacking)}")
    return found


def single_file_suffix(path: Path) -> str:
    """Of a single file, however it is spelled; "" of a directory."""
    suffix = path.suffix.lower()
    return suffix if suffix in SINGLE_FILE_SUFFIXES else ""


def save(path: Path, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo) -> None:
    """Writes one file, or a directory where the name has no suffix of a weights file."""
    try:
        with atomic_path(path) as part:
            if suffix := single_file_suffix(path):
                _save_file(part, suffix, dialect, tensors, info)
            else:
                _save_directory(part, dialect, tensors, info)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch's, of a full disk
        reason = getattr(error, "strerror", None) or str(error)
        raise ConvertError(f"cannot write {path}: {reason}") from error


def _save_directory(
    path: Path, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo
) -> None:
    path.mkdir()
    name = weights_name(dialect)
    _save_file(path / name, Path(name).suffix, dialect, tensors, info)
    for file, content in zip(CONFIG_NAMES[dialect], _configs(dialect, info)):
        (path / file).write_text(json.dumps(content, indent=2) + "\n")


def weights_name(dialect: str) -> str:
    """The weights file in a directory; the official code opens nothing but torch's files."""
    return "checkpoint.pth" if dialect == "official" else "model.safetensors"


CONFIG_NAMES = {
    "mae_jax": (),
    "official": (),
    "timm": ("config.json",),
    "hf": ("config.json", "preprocessor_config.json"),
}


def _configs(dialect: str, info: ModelInfo) -> list[dict[str, Any]]:
    """Contents of the files called CONFIG_NAMES."""
    if dialect == "hf":
        return [hf_timm.hf_config(info), hf_timm.hf_preprocessor(info)]
    return [hf_timm.timm_config(info)] if dialect == "timm" else []


def _save_file(
    path: Path, suffix: str, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo
) -> None:
    if suffix == ".safetensors":
        # transformers insists on a format; with one entry alone the bytes are always the same.
        metadata = {"format": "pt"} if dialect == "hf" else {}
        save_file(tensors, path, metadata | {METADATA: info.to_json()})
        umask = os.umask(0)  # there is no other way to ask for it
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    elif dialect in ("official", "mae_jax"):
        torch_io.save(path, tensors, {METADATA: info.to_json()})
    else:  # these are loaded as a bare state dict
        torch_io.save(path, tensors, None)
