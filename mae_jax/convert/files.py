"""Tensors and facts in files and directories, under whatever names they have there."""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mae_jax.checkpoint import CheckpointError, read_run
from mae_jax.convert import configs, torch_io
from mae_jax.convert.info import ConvertError, Info, facts_from_json
from mae_jax.models.patches import patch_grid, sincos_position_table
from mae_jax.trees import named_leaves
from mae_jax.whole import whole

log = logging.getLogger("mae_jax")

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WRITTEN = (".safetensors", ".pth")  # any other name is a directory
WRAPPINGS = ("_orig_mod.", "module.", "_orig_mod.")  # by torch.compile, DistributedDataParallel
METADATA = "mae_jax"  # the key of an Info in JSON, in safetensors headers and beside "model"


@dataclass
class Found:
    """tensors: by their own names; facts: fields of an `Info` that are told beside them."""

    tensors: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)


def load(path: Path, *, ema: bool = False) -> Found:
    """Everything in a weights file, a directory with one, or a run of ours.

    Args:
      ema: of a run, the average of the parameters instead of the last ones.

    Raises:
      ConvertError: there is nothing of the kind, or it is damaged.
    """
    if not path.exists():
        raise ConvertError(f"{path} does not exist")
    if path.is_dir() and (steps := _run_steps(path)) is not None:
        return _load_run(*steps, ema=ema)
    if ema:
        raise ConvertError(f"{path} is no run of mae_jax: only those keep an average apart")
    found = _load_directory(path) if path.is_dir() else _load_file(path)
    for prefix in WRAPPINGS:
        if all(name.startswith(prefix) for name in found.tensors):
            found.tensors = {n.removeprefix(prefix): x for n, x in found.tensors.items()}
    return found


def _load_file(path: Path) -> Found:
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _load_torch(path)
    raise ConvertError(
        f"{path} is not a checkpoint by its name: .safetensors, {', '.join(TORCH_SUFFIXES)} "
        "are read, and directories"
    )


def _load_safetensors(path: Path) -> Found:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, KeyError, AttributeError) as error:
        raise ConvertError(f"{path} is truncated, damaged or no checkpoint: {error}") from error
    facts = facts_from_json(metadata[METADATA], str(path)) if METADATA in metadata else {}
    return Found(tensors, facts)


def _load_torch(path: Path) -> Found:
    tensors, rest = torch_io.load(path)
    facts = _facts_of_name(path)
    arguments = vars(rest["args"]) if hasattr(rest.get("args"), "__dict__") else {}
    if "norm_pix_loss" in arguments:
        facts["target"] = "normalized" if arguments["norm_pix_loss"] else "pixels"
    if isinstance(rest.get(METADATA), str):
        facts |= facts_from_json(rest.pop(METADATA), str(path))
    if rest:
        log.info("left behind in %s: %s", path.name, ", ".join(map(str, rest)))
    return Found(tensors, facts)


def _facts_of_name(path: Path) -> dict[str, Any]:
    """The target kinds of the official files, which nothing inside them tells."""
    if re.match(r"mae_visualize_vit_\w+", path.name):
        return {"target": "pixels"}
    if re.match(r"mae_pretrain_vit_\w+_full", path.name):
        return {"target": "normalized"}
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error


def _load_directory(path: Path) -> Found:
    found = _merge([_load_file(file) for file in _weight_files(path)])
    config = _read_json(path / "config.json")
    if "architecture" in config:
        found.facts = configs.timm_facts(config) | found.facts
    elif config.get("model_type") in ("vit_mae", "vit"):
        preprocessor = _read_json(path / "preprocessor_config.json")
        found.facts = configs.hf_facts(config, preprocessor) | found.facts
    elif config:
        log.warning(
            "%s says model_type=%r, which is neither vit_mae nor vit; it is not used",
            path / "config.json",
            config.get("model_type"),
        )
    return found


def _weight_files(path: Path) -> list[Path]:
    """The files that hold a directory's weights: as HuggingFace names them, or the only one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            return [path / part for part in sorted(set(_read_json(index)["weight_map"].values()))]
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    files = [file for file in sorted(path.iterdir()) if file.suffix in suffixes]
    if len(files) == 1:
        return files
    raise ConvertError(
        f"{path} is no run and holds {len(files) or 'no'} weights files"
        + (f" ({', '.join(file.name for file in files[:5])}): name one" if files else "")
    )


def _merge(parts: list[Found]) -> Found:
    merged = Found({})
    for part in parts:
        merged.tensors |= part.tensors
        merged.facts |= part.facts
    return merged


def _run_steps(path: Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints and the step that a path means; None if it is no run."""
    if (path / "params").is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
    return (folder, None) if steps else None


def _load_run(folder: Path, step: int | None, *, ema: bool) -> Found:
    try:
        step, params, meta = read_run(folder, step, item="ema" if ema else "params")
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    log.info("read step %d of %s", step, folder)
    model, target, data = (meta["config"][group] for group in ("model", "target", "data"))
    facts = {
        name: model[name]
        for name in (
            *("width", "depth", "heads", "mlp_ratio", "patch", "channels", "layer_norm_eps"),
            *("decoder_width", "decoder_depth", "decoder_heads"),
        )
    }
    facts |= {
        "dialect": "mae_jax",
        "decoder_mlp_ratio": model["mlp_ratio"],
        "image_size": tuple(model["image_size"]),
        "target": "normalized" if target["norm_pix"] else "pixels",
        "norm_pix_eps": target["norm_pix_eps"],
        "mean": tuple(data["mean"])[: model["channels"]],
        "std": tuple(data["std"])[: model["channels"]],
        "resize": "crop",
        "crop": data["eval_crop"],
        "interpolation": "bicubic",
    }
    tensors = named_leaves(params)
    # Sine-cosine tables are no parameters of a run, but part of every file.
    grid = patch_grid(facts["image_size"], facts["patch"])
    for part, width in (("encoder", facts["width"]), ("decoder", facts["decoder_width"])):
        table = sincos_position_table(width, grid)[None]
        tensors.setdefault(f"{part}/pos_embed/table", table)
    return Found(tensors, facts)


def save(path: Path, dialect: str, tensors: dict[str, np.ndarray], info: Info) -> None:
    """Writes one file, or a directory where the name has no suffix of a weights file."""
    try:
        with whole(path) as part:
            if path.suffix in WRITTEN:
                _save_file(part, path.suffix, dialect, tensors, info)
            else:
                _save_directory(part, dialect, tensors, info)
    except OSError as error:
        raise ConvertError(f"cannot write {path}: {error.strerror or error}") from error


def _save_directory(path: Path, dialect: str, tensors: dict[str, np.ndarray], info: Info) -> None:
    path.mkdir()
    # The official code opens nothing but torch's files.
    name, suffix = ("checkpoint", ".pth") if dialect == "official" else ("model", ".safetensors")
    _save_file(path / f"{name}{suffix}", suffix, dialect, tensors, info)
    for file, content in _configs(dialect, info).items():
        (path / file).write_text(json.dumps(content, indent=2) + "\n")


def _configs(dialect: str, info: Info) -> dict[str, Any]:
    if dialect == "hf":
        return {
            "config.json": configs.hf_config(info),
            "preprocessor_config.json": configs.hf_preprocessor(info),
        }
    return {"config.json": configs.timm_config(info)} if dialect == "timm" else {}


def _save_file(
    path: Path, suffix: str, dialect: str, tensors: dict[str, np.ndarray], info: Info
) -> None:
    if suffix == ".safetensors":
        # transformers insists on a format; with one entry alone the bytes are always the same.
        metadata = {"format": "pt"} if dialect == "hf" else {}
        save_file(tensors, path, metadata | {METADATA: info.to_json()})
    elif dialect in ("official", "mae_jax"):
        torch_io.save(path, tensors, {METADATA: info.to_json()})
    else:  # these are loaded as a bare state dict
        torch_io.save(path, tensors, None)
