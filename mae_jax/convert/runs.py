"""Workdirs of our own runs, as the converter reads them."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.checkpoint import CheckpointError, read_run
from mae_jax.convert.info import ConvertError
from mae_jax.models.patches import patch_grid, sincos_position_table
from mae_jax.trees import named_leaves

log = logging.getLogger("mae_jax")


def run_steps(path: Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints and the step that a path means; None if it is no run."""
    if (path / "params").is_dir() and path.name.isdigit():
        return path.parent, int(path.name)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
    return (folder, None) if steps else None


RUN_FACTS = [
    "width",
    "depth",
    "heads",
    "mlp_ratio",
    "patch",
    "channels",
    "layer_norm_eps",
    "decoder_width",
    "decoder_depth",
    "decoder_heads",
]


def load_run(
    folder: Path, step: int | None, *, ema: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by our names, and the fields of an `Info` that the run's config tells."""
    try:
        step, params, meta = read_run(folder, step, item="ema" if ema else "params")
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    except OSError as error:
        raise ConvertError(f"{folder} changed while it was read; try again: {error}") from error
    log.info("read step %d of %s", step, folder)
    model, target, data = (meta["config"][group] for group in ("model", "target", "data"))
    facts = {name: model[name] for name in RUN_FACTS}
    facts |= {
        "source": "mae_jax",
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
    return tensors, facts
