"""Read the checkpoints of a training run: parameters and metadata from its workdir."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.convert.model_info import ConvertError
from mae_jax.data.transforms import default_crop_ratio
from mae_jax.distributed.checkpoint_reader import CheckpointError, load_run_checkpoint
from mae_jax.models.patches import patch_grid, sincos_pos_embed_2d
from mae_jax.utils.pytree import flatten
from mae_jax.utils.sides import height_width, simplify

log = logging.getLogger("mae_jax")


def find_checkpoints(path: Path) -> tuple[Path, int | None] | None:
    """Return the folder of checkpoints, and the step of a step folder; None if there is no run.

    Args:
      path: a workdir, its folder of checkpoints, or the folder of one step.
    """
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
    """Read the parameters of a run and the fields of a `ModelInfo` from its config.

    Args:
      step: None for the latest.
      ema: read the EMA parameters instead of the last ones.

    Raises:
      ConvertError: the checkpoint is corrupt, or changes during the read.
    """
    try:
        step, trees, meta = load_run_checkpoint(
            folder, step, items=("ema" if ema else "params", "batch_stats")
        )
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    except OSError as error:
        raise ConvertError(f"{folder} changed during the read; try again: {error}") from error
    log.info("read step %d of %s", step, folder)
    config = meta["config"]
    model, data = config["model"], config["data"]
    metadata = {name: model[name] for name in ENCODER_KEYS}
    metadata["patch"] = simplify(*height_width(model["patch"]))
    metadata["class_tokens"] = model.get("class_tokens", 1)
    metadata |= {
        "source": "mae_jax",
        "image_size": tuple(model["image_size"]),
        "mean": tuple(data["mean"])[: model["channels"]],
        "std": tuple(data["std"])[: model["channels"]],
        "resize": "crop",
        "crop": data["eval_crop"] or default_crop_ratio(model["image_size"]),
        "interpolation": "bicubic",
        "exif": data.get("exif", False),  # older runs lack these keys
        "bit_depth": data.get("bit_depth"),
        "nodata": data.get("nodata"),
        "bands": data.get("bands"),
        "dicom_window": data.get("dicom_window"),
        "pixels": _pixels(meta),
        "norm_pix_eps": config["target"]["norm_pix_eps"],
    }
    tensors = {name: x for tree in trees for name, x in flatten(tree).items()}
    if config["task"] == "classify":
        classify = config["classify"]
        metadata |= {name: classify[name] for name in ("pool", "fc_norm", "head_norm")}
        metadata |= _class_metadata(tensors, meta)
    elif config["task"] == "segment":
        segment = config["segment"]
        width = segment["head_width"] if segment["head"] == "upsample" else 0
        metadata |= {"pool": "grid", "head_norm": segment["head_norm"], "upsample_width": width}
        metadata |= {"resize": "squash", "crop": 1.0}  # as WholeTransform
        metadata |= _class_metadata(tensors, meta)
    else:
        metadata |= _decoder_metadata(config)
    # Fixed sine-cosine embeddings are not parameters of a run, but checkpoint files contain them.
    grid = patch_grid(metadata["image_size"], metadata["patch"])
    widths = {"encoder": metadata["width"], "decoder": metadata.get("decoder_width")}
    for tower, width in widths.items():
        if width:
            table = sincos_pos_embed_2d(width, grid, metadata["class_tokens"])[None]
            tensors.setdefault(f"{tower}/pos_embed/table", table)
    return tensors, metadata


def _pixels(meta: dict[str, Any]) -> str:
    """Return which images mean and std are for; older runs did not record it."""
    dtype = meta.get("pixel_dtype")
    if dtype is None:
        return "unknown"
    return "uint8" if dtype == "uint8" else "other"


def _decoder_metadata(config: dict[str, Any]) -> dict[str, Any]:
    model = config["model"]
    metadata = {name: model[name] for name in DECODER_KEYS}
    if config["mask"]["kind"] != "user":  # a mask file determines the ratio
        metadata["mask_ratio"] = config["mask"]["ratio"]
        metadata["mask_cell"] = config["mask"].get("cell", 1)
    return metadata | {
        "decoder_mlp_ratio": model["mlp_ratio"],
        "target": "normalized" if config["target"]["norm_pix"] else "pixels",
    }


def _class_metadata(tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> dict[str, Any]:
    num_classes = len(tensors["head/bias"]) if "head/bias" in tensors else 0
    names = tuple(meta["classes"])
    return {
        "num_classes": num_classes,
        "class_names": names if len(names) == num_classes else (),
    }
