"""Detect the format and the architecture of a checkpoint from its tensors and metadata."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mae_jax.convert.hf_timm import size_mismatches
from mae_jax.convert.key_maps import Layout
from mae_jax.convert.model_info import DEFAULTS, REQUIRED, ConvertError, ModelInfo, expand_stats
from mae_jax.convert.networks import expected_shapes
from mae_jax.convert.state_dict import Arrays, Shapes, detect_layout, find_mismatches
from mae_jax.convert.weight_files import RawCheckpoint
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import height_width, sides_text, simplify

log = logging.getLogger("mae_jax")


def detect(
    raw: RawCheckpoint,
    path: Path,
    *,
    dialect: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    layer_norm_eps: float | None = None,
    target: str | None = None,
    pool: str | None = None,
    grid: tuple[int, int] | None = None,
    require_num_heads: Collection[str] = ("encoder", "decoder"),
) -> tuple[Layout, ModelInfo, Shapes]:
    """Detect the format and the architecture of a checkpoint, and check all its tensors.

    Args:
      path: for messages.
      dialect: format, one of `DIALECTS`; None detects it from the keys.
      heads, decoder_heads: numbers of attention heads, if the file lacks them and the size is not
        a standard one.
      layer_norm_eps, target, pool: override the metadata of the file and the format's defaults.
      grid: rows and columns of patches, if the file lacks the image size and it is not square.
      require_num_heads: towers ("encoder", "decoder") that must have a known number of heads.

    Returns:
      The layout of the state dict, the metadata, and the shapes of our parameters by path.

    Raises:
      ConvertError: a tensor is missing, unexpected or of a wrong shape, or metadata is unknown.
    """
    layout = detect_layout(
        raw.tensors, dialect or raw.dialect, str(path), pixio=_is_pixio(raw, dialect)
    )
    log.info("%s is in the format %s", path, layout)
    _check_dtypes(raw.tensors, path)
    structure, num_positions = _structure(layout, raw, path)
    metadata = raw.metadata | structure
    metadata["image_size"] = _image_size(metadata, num_positions, grid, path)
    metadata["heads"] = _num_heads(metadata, "", heads, path)
    if metadata.get("decoder_depth"):
        metadata["decoder_heads"] = _num_heads(metadata, "decoder_", decoder_heads, path)
    else:  # config.json may describe a decoder that the tensors lack
        metadata |= {"decoder_heads": 0, "target": "unknown"}
    overrides = {"target": target, "layer_norm_eps": layer_norm_eps, "pool": pool}
    for name, override in overrides.items():
        if override is not None:
            declared = metadata.get(name, override)
            if declared not in (override, "unknown"):
                log.warning("%s has %s=%s; overridden by %s", path, name, declared, override)
            metadata[name] = override
    try:
        info = _fill_defaults(layout, metadata, path)
        shapes = expected_shapes(info)
    except (UserError, ValueError) as error:
        raise ConvertError(f"{path}: {error}") from error
    _check_declared_sizes(raw, info, path)
    _check_num_heads(info, require_num_heads, path)
    _raise_mismatch(path, layout, find_mismatches(layout, shapes, raw.tensors, info.patch))
    return layout, info, shapes


def _is_pixio(raw: RawCheckpoint, dialect: str | None) -> bool:
    """Return whether a checkpoint is Pixio's, where MAE and ViT have the same keys."""
    if dialect == "pixio" or raw.metadata.get("source") == "pixio":
        return True
    names = ("cls_token", "embeddings.cls_token")
    tokens = [raw.tensors[name] for name in names if name in raw.tensors]
    return any(token.ndim == 3 and token.shape[1] > 1 for token in tokens)


def _raise_mismatch(path: Path, layout: Layout, lines: list[str]) -> None:
    """Raise ConvertError with all mismatches, if there are any."""
    if lines:
        mismatches = "\n  ".join(lines)
        raise ConvertError(f"{path} does not match the format {layout}:\n  {mismatches}")


def _check_declared_sizes(raw: RawCheckpoint, info: ModelInfo, path: Path) -> None:
    """Raise ConvertError if config.json has other sizes than the tensors, usually more blocks."""
    if mismatches := size_mismatches(raw.declared_sizes, info):
        raise ConvertError(
            f"{path / 'config.json'} contradicts the weights: {', '.join(mismatches)}. Some of "
            "the weights are missing, or one of the files belongs to another model"
        )


def _check_dtypes(tensors: Arrays, path: Path) -> None:
    """Raise ConvertError for tensors that are not floating point."""
    invalid = [
        f"{name} ({array.dtype})"
        for name, array in tensors.items()
        if not jnp.issubdtype(array.dtype, jnp.floating) and "num_batches" not in name
        if not name.endswith("/count")
    ]
    if invalid:
        raise ConvertError(f"{path} has tensors that are not floating point: {', '.join(invalid)}")


def _structure(layout: Layout, raw: RawCheckpoint, path: Path) -> tuple[dict[str, Any], int | None]:
    """Return the fields of a `ModelInfo` that keys and shapes determine.

    The second value is the number of rows of the positional embedding. Files of mae_jax have all of
    this in their metadata; their stacked blocks are not inspected.
    """
    if layout.dialect == "mae_jax":
        missing = sorted(REQUIRED - DEFAULTS["mae_jax"].keys() - raw.metadata.keys())
        if missing:
            raise ConvertError(
                f"{path} has the keys of mae_jax, but its metadata lacks {', '.join(missing)}"
            )
        return {}, None
    matches = [match for name in raw.tensors if (match := layout.match(name))]
    parts = {param.split("/")[0] for param, _ in matches}
    shapes = _reference_shapes(layout, raw.tensors, parts, path)
    depths = {
        tower: _depth({block for param, block in matches if param.startswith(f"{tower}/blocks/")})
        for tower in ("encoder", "decoder")
    }
    width, channels, *sides = shapes["encoder/patch_embed/kernel"]
    fields: dict[str, Any] = {
        "width": width,
        "class_tokens": shapes["encoder/cls_token"][1],
        "channels": channels,
        "patch": simplify(*sides),
        "depth": depths["encoder"],
        "mlp_ratio": shapes["encoder/blocks/mlp/fc1/bias"][0] / width,
        "fc_norm": "fc_norm" in parts,
        "head_norm": "head_norm" in parts,
        "num_classes": shapes["head/bias"][0] if "head" in parts else 0,
    }
    if "fc_norm" in parts and "pool" not in raw.metadata:
        fields["pool"] = "mean"
    if "decoder" in parts:
        fields["decoder_depth"] = depths["decoder"]
        fields["decoder_width"] = shapes["decoder/mask_token"][2]
        hidden = shapes["decoder/blocks/mlp/fc1/bias"][0]
        fields["decoder_mlp_ratio"] = hidden / fields["decoder_width"]
    return fields, shapes["encoder/pos_embed/table"][1]


def _depth(blocks: set[int]) -> int:
    """Return the number of blocks, including a few missing ones, but not one stray block."""
    depth = 1 + max(blocks, default=-1)
    if 2 * len(blocks) > depth:
        return depth
    return next(block for block in range(depth + 1) if block not in blocks)


# The parameters whose shapes determine all other sizes, and their number of axes.
_REFERENCE_SHAPES = {
    "encoder/cls_token": 3,
    "encoder/pos_embed/table": 3,
    "encoder/patch_embed/kernel": 4,
    "encoder/blocks/mlp/fc1/bias": 1,
    "decoder/mask_token": 3,
    "decoder/blocks/mlp/fc1/bias": 1,
    "head/bias": 1,
}


def _reference_shapes(
    layout: Layout, tensors: Arrays, parts: set[str], path: Path
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of _REFERENCE_SHAPES; if one is invalid, raise with all unknown keys."""
    shapes, lines = {}, []
    for param, ndim in _REFERENCE_SHAPES.items():
        if param.split("/")[0] in parts | {"encoder"}:
            name = layout.external_name(param)
            if name not in tensors:
                lines.append(f"- {name} is missing")
            elif tensors[name].ndim != ndim or 0 in tensors[name].shape:
                shape = tensors[name].shape
                lines.append(f"! {name} has shape {shape}, the model needs {ndim} axes")
            else:
                shapes[param] = tensors[name].shape
    if lines:
        lines += [
            f"+ {name} {array.shape} is not part of the model"
            for name, array in tensors.items()
            if not layout.match(name)
        ]
    _raise_mismatch(path, layout, lines)
    return shapes


def _image_size(
    metadata: dict[str, Any], num_positions: int | None, grid: tuple[int, int] | None, path: Path
) -> tuple[int, int]:
    """Return height and width in pixels: as declared, else of the grid, else of a square grid.

    That of patches that are not square cannot be guessed.
    """
    patch, declared = metadata["patch"], metadata.get("image_size")
    height, width = height_width(patch)
    if declared:
        if grid and (grid[0] * height, grid[1] * width) != declared:
            raise ConvertError(
                f"{path} has image_size={declared}, which does not match a grid of {grid} patches "
                f"of {sides_text(patch)} pixels: leave out --grid-size (in Python, grid=)"
            )
        return declared
    class_tokens = metadata.get("class_tokens", 1)
    num_patches = (num_positions or class_tokens) - class_tokens
    if not grid and height != width:
        raise ConvertError(
            f"{path} does not record how its {num_patches} patches of {sides_text(patch)} pixels "
            "are arranged: set --grid-size ROWS,COLUMNS (in Python, grid=)"
        )
    side = math.isqrt(num_patches)
    grid = grid or (side, side)
    if grid[0] * grid[1] != num_patches or not num_patches:
        raise ConvertError(
            f"{path} has positional embeddings of {num_patches} patches, not {grid[0]} x "
            f"{grid[1]}: set --grid-size ROWS,COLUMNS (in Python, grid=). Positional embeddings "
            "without a row for the cls token (timm's no_embed_class) are not supported"
        )
    return grid[0] * height, grid[1] * width


def _num_heads(metadata: dict[str, Any], tower: str, override: int | None, path: Path) -> int:
    """Return the heads of a tower ("" or "decoder_"): declared, given or standard; 0 if unknown."""
    declared = metadata.get(f"{tower}heads")
    if override and declared and override != declared:
        width, depth = (metadata[f"{tower}{key}"] for key in ("width", "depth"))
        raise ConvertError(
            f"{path} has {tower}heads={declared}, not {override} ({tower}width={width}, "
            f"{tower}depth={depth}, patch={metadata['patch']})"
        )
    for variant in map(vars, VARIANTS.values()):
        keys = (f"{tower}width", f"{tower}depth")
        if all(variant[key] == metadata.get(key) for key in keys):
            return declared or override or variant[f"{tower}heads"]
    return declared or override or 0


def _check_num_heads(info: ModelInfo, towers: Collection[str], path: Path) -> None:
    """Raise ConvertError if a tower has an unknown number of heads."""
    unknown = {}
    if not info.heads:
        unknown["encoder"] = (info.width, info.depth, "--num-heads")
    if info.decoder_depth and not info.decoder_heads:
        unknown["decoder"] = (info.decoder_width, info.decoder_depth, "--decoder-num-heads")
    unknown = {tower: size for tower, size in unknown.items() if tower in towers}
    if unknown:
        sizes = " and ".join(f"{t} ({w} features x {d} blocks)" for t, (w, d, _) in unknown.items())
        flags = " and ".join(flag for _, _, flag in unknown.values())
        raise ConvertError(
            f"{path} does not record the number of attention heads of its {sizes}, which is not a "
            f"standard size: set {flags} (in Python, heads= and decoder_heads=)"
        )


def _fill_defaults(layout: Layout, metadata: dict[str, Any], path: Path) -> ModelInfo:
    """Return a `ModelInfo`, with the format's defaults for metadata that the file lacks."""
    hf_pixio = layout.dialect == "hf" and layout.pixio
    defaults = dict(DEFAULTS["hf_pixio" if hf_pixio else layout.dialect])
    for name in ("mean", "std"):
        defaults[name] = expand_stats(defaults[name], metadata["channels"])
    absent = {name: value for name, value in defaults.items() if name not in metadata}
    if absent:
        values = ", ".join(f"{name}={value}" for name, value in absent.items())
        log.info("%s: using the defaults of %s for %s", path, layout.dialect, values)
    source = "pixio" if layout.pixio else layout.dialect
    metadata = {"source": source, **defaults, **metadata}
    names, num_classes = metadata.get("class_names", ()), metadata.get("num_classes", 0)
    if names and len(names) != num_classes:
        if num_classes:
            log.warning(
                "%s names %d classes, but its head has %d: the names are ignored",
                path,
                len(names),
                num_classes,
            )
        metadata["class_names"] = ()
    return ModelInfo(**metadata)
