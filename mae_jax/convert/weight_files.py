"""Read and write single weight files: safetensors, and those of torch.save."""

import argparse
import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mae_jax.convert import torch_io
from mae_jax.convert.model_info import ConvertError, ModelInfo, metadata_from_json

log = logging.getLogger("mae_jax")

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
METADATA_KEY = "mae_jax"  # of a ModelInfo in JSON: in safetensors headers, and next to "model"


@dataclass
class RawCheckpoint:
    """The content of a checkpoint before its format is detected.

    tensors: by the keys of the file.
    metadata: fields of a `ModelInfo` that the file or its directory contains.
    dialect: format, if something other than the keys determines it.
    declared_sizes: sizes in config.json, to be checked against the tensors.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any] = field(default_factory=dict)
    dialect: str | None = None
    declared_sizes: dict[str, Any] = field(default_factory=dict)


def choose_weights(names: Collection[str]) -> str | None:
    """Return which file of a directory has the weights, or is the index of its shards.

    The names of Hugging Face come first, safetensors before pickles, then the only weights file;
    None if there is none, or more than one to choose from.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (name, f"{name}.index.json"):
            if file in names:
                return file
    files = [name for name in names if name.lower().endswith(SUFFIXES)]
    return files[0] if len(files) == 1 else None


def is_self_describing(path: Path) -> bool:
    """Return whether a file of safetensors has all metadata of its model in its header."""
    try:
        with safe_open(path, framework="numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_file(path: Path) -> RawCheckpoint:
    """Read the tensors and metadata of one file.

    Raises:
      ConvertError: the file is not a checkpoint, or corrupt.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConvertError(
            f"{path} is not a checkpoint: its name must end in {', '.join(SUFFIXES)}, or be that "
            "of a directory"
        )
    _check_magic_bytes(path, suffix)
    return _load_safetensors(path) if suffix == ".safetensors" else _load_torch(path)


def _check_magic_bytes(path: Path, suffix: str) -> None:
    """Raise ConvertError if the first bytes do not match the suffix."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror}") from error
    is_torch = head.startswith((b"PK\x03\x04", b"\x80"))
    if not head:
        raise ConvertError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path} is a git-lfs pointer, not the file itself: run git lfs pull")
    if is_torch and suffix == ".safetensors" and head[8:9] != b"{":
        raise ConvertError(f"{path} is a file of torch.save or a zip: rename it to .pth")
    if not is_torch and suffix != ".safetensors":
        raise ConvertError(f"{path} is not a checkpoint: it has no header of torch.save")


def _load_safetensors(path: Path) -> RawCheckpoint:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ConvertError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ConvertError(f"{path} is truncated, corrupt or not a checkpoint: {error}") from error
    except (TypeError, AttributeError) as error:  # safetensors looks the dtype up in numpy
        raise ConvertError(f"{path} has tensors of a dtype that numpy lacks: {error}") from error
    metadata = {}
    if METADATA_KEY in header:
        metadata = metadata_from_json(header[METADATA_KEY], str(path))
    return RawCheckpoint(tensors, metadata)


def _load_torch(path: Path) -> RawCheckpoint:
    tensors, rest = torch_io.load(path)
    metadata = _metadata_from_filename(path)
    args = rest.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, dict):
        metadata |= _metadata_from_args(args)
    if isinstance(rest.get(METADATA_KEY), str):
        metadata |= metadata_from_json(rest.pop(METADATA_KEY), str(path))
    if rest:
        log.info("ignored in %s: %s", path.name, ", ".join(map(str, rest)))
    return RawCheckpoint(tensors, metadata)


def _metadata_from_args(args: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata in the command-line arguments of an official training run."""
    metadata = {}
    if "norm_pix_loss" in args:
        metadata["target"] = "normalized" if args["norm_pix_loss"] else "pixels"
    if "mask_ratio" in args:
        metadata["mask_ratio"] = args["mask_ratio"]
    if "mask_grid" in args:  # of Pixio only
        metadata |= {"source": "pixio", "mask_cell": args["mask_grid"]}
    return metadata


def _metadata_from_filename(path: Path) -> dict[str, Any]:
    """Return the target of an official file, which only its name indicates."""
    if re.match(r"mae_visualize_vit_\w+", path.name):
        return {"target": "pixels"}
    if re.match(r"mae_pretrain_vit_\w+_full", path.name):
        return {"target": "normalized"}
    return {}


def write_file(
    path: Path, suffix: str, dialect: str, tensors: dict[str, np.ndarray], info: ModelInfo
) -> None:
    """Write one file in the type of a suffix, ".safetensors" or ".pth"."""
    if suffix == ".safetensors":
        # transformers requires "format". The others get one entry, so that bytes are reproducible.
        header = {"format": "pt"} if dialect == "hf" else {}
        save_file(tensors, path, header | {METADATA_KEY: info.to_json()})
        umask = os.umask(0)  # the only way to read it
        os.umask(umask)
        path.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read
    elif is_bare(dialect, info):
        torch_io.save(path, tensors, None)
    else:
        torch_io.save(path, tensors, {METADATA_KEY: info.to_json()})


def is_bare(dialect: str, info: ModelInfo) -> bool:
    """Return whether the program of a format reads a .pth that is a state dict, nothing around it.

    As in the reference: of Pixio, encoders are bare, and pretraining checkpoints are not.
    """
    return dialect in ("hf", "timm") or (dialect == "pixio" and not info.decoder_depth)
