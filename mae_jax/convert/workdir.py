"""Workdirs of our own runs, as the converter reads them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.convert.model_info import ConvertError
from mae_jax.data.transforms import default_crop_ratio
from mae_jax.distributed.checkpoint_reader import CheckpointError, load_run_checkpoint
from mae_jax.models.patches import patch_grid, sincos_pos_embed_2d
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax")


def run_steps(path: Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints and the step that a path means; None if it is no run."""
    if (path / "params").is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
    return (folder, None) if steps else None


ENCODER_KEYS = ["width", "depth", "heads", "mlp_ratio", "patch", "channels", "layer_norm_eps"]
DECODER_KEYS = ["decoder_width", "decoder_depth", "decoder_heads"]


def load_run(
    folder: Path, step: int | None, *, ema: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by our names, and the fields of an `Info` that the run's config tells."""
    try:
        step, trees, meta = load_run_checkpoint(
            folder, step, items=("ema" if ema else "params", "batch_stats")
        )
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    except OSError as error:
        raise ConvertError(f"{folder} changed while it was read; try again: {error}") from error
    log.info("read step %d of %s", step, folder)
    config = meta["config"]
    model, data = config["model"], config["data"]
    facts = {name: model[name] for name in ENCODER_KEYS}
    facts |= {
        "source": "mae_jax",
        "image_size": tuple(model["image_size"]),
        "mean": tuple(data["mean"])[: model["channels"]],
        "std": tuple(data["std"])[: model["channels"]],
        "resize": "crop",
        "crop": data["eval_crop"] or default_crop_ratio(model["image_size"]),
        "interpolation": "bicubic",
        "exif": data.get("exif", False),  # runs from before there was one ignored it
        "norm_pix_eps": config["target"]["norm_pix_eps"],
    }
    tensors = {name: x for tree in trees for name, x in flatten(tree).items()}
    classifies = config["task"] == "classify"
    facts |= _head_metadata(config, tensors, meta) if classifies else _decoder_metadata(config)
    # Sine-cosine tables are no parameters of a run, but part of every file.
    grid = patch_grid(facts["image_size"], facts["patch"])
    towers = {"encoder": facts["width"], "decoder": facts.get("decoder_width")}
    for part, width in towers.items():
        if width:
            table = sincos_pos_embed_2d(width, grid)[None]
            tensors.setdefault(f"{part}/pos_embed/table", table)
    return tensors, facts


def _decoder_metadata(config: dict[str, Any]) -> dict[str, Any]:
    model = config["model"]
    facts = {name: model[name] for name in DECODER_KEYS}
    if config["mask"]["kind"] != "user":  # whose file tells how many patches are hidden
        facts["mask_ratio"] = config["mask"]["ratio"]
    return facts | {
        "decoder_mlp_ratio": model["mlp_ratio"],
        "target": "normalized" if config["target"]["norm_pix"] else "pixels",
    }


def _head_metadata(
    config: dict[str, Any], tensors: dict[str, np.ndarray], meta: dict[str, Any]
) -> dict[str, Any]:
    classify = config["classify"]
    num_classes = len(tensors["head/bias"]) if "head/bias" in tensors else 0
    names = tuple(meta["classes"])
    return {
        "pool": classify["pool"],
        "fc_norm": classify["fc_norm"],
        "head_norm": classify["head_norm"],
        "num_classes": num_classes,
        "class_names": names if len(names) == num_classes else (),
    }
