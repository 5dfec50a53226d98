"""What the tensors of a checkpoint are: its dialect, its sizes, and all else that it tells."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from mae_jax.convert.hf_timm import size_mismatches
from mae_jax.convert.io import RawCheckpoint
from mae_jax.convert.key_maps import Layout
from mae_jax.convert.model_info import (
    DEFAULTS,
    REQUIRED,
    ConvertError,
    ModelInfo,
    expand_stats,
    expected_shapes,
)
from mae_jax.convert.state_dict import Arrays, Shapes, detect_layout, find_mismatches
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")


def detect(
    found: RawCheckpoint,
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
    """What tensors are, and the shapes of ours that they make; `path` is for messages.

    Args:
      dialect: "mae_jax", "official", "hf" or "timm"; None recognises it by the names of tensors.
      heads, decoder_heads: where the file does not tell, and the size is not a known one.
      layer_norm_eps, target, pool: instead of what the file or its dialect says.
      grid: rows and columns of patches, where they are not as many and the file does not tell.
      require_num_heads: of which an unknown number of heads is an error.

    Raises:
      ConvertError: anything is missing, unexpected, of a wrong shape, or cannot be known.
    """
    layout = detect_layout(found.tensors, dialect or found.dialect, str(path))
    log.info("%s is %s", path, layout)
    _check_types(found.tensors, path)
    structure, rows = _structure(layout, found, path)
    facts = found.metadata | structure
    facts["image_size"] = _image_size(facts, rows, grid, path)
    facts["heads"] = _heads(facts, "", heads, path)
    if facts.get("decoder_depth"):
        facts["decoder_heads"] = _heads(facts, "decoder_", decoder_heads, path)
    else:  # config.json may tell of one that is not there
        facts |= {"decoder_heads": 0, "target": "unknown"}
    said = {"target": target, "layer_norm_eps": layer_norm_eps, "pool": pool}
    for name, asked in said.items():
        if asked is not None and facts.get(name, asked) not in (asked, "unknown"):
            log.warning("%s says %s=%s; %s is what you say", path, name, facts[name], asked)
        facts |= {name: asked} if asked is not None else {}
    try:
        info = _fill_defaults(layout, facts, path)
        _check_sizes(found, info, path)
        _check_heads(info, require_num_heads, path)
        shapes = expected_shapes(info)
    except ConvertError:
        raise
    except (UserError, ValueError) as error:
        raise ConvertError(f"{path}: {error}") from error
    _raise_mismatch(path, layout, find_mismatches(layout, shapes, found.tensors, info.patch))
    return layout, info, shapes


def _raise_mismatch(path: Path, layout: Layout, lines: list[str]) -> None:
    if lines:
        listed = "\n  ".join(lines)
        raise ConvertError(f"{path} does not fit {layout}; nothing was read from it:\n  {listed}")


def _check_sizes(found: RawCheckpoint, info: ModelInfo, path: Path) -> None:
    """ConvertError where config.json tells of another model: of more blocks, as a rule."""
    if odd := size_mismatches(found.declared_sizes, info):
        raise ConvertError(
            f"{path / 'config.json'} contradicts the weights beside it: {', '.join(odd)}. "
            "Some of the weights are missing, or one of the files is another model's"
        )


def _check_types(tensors: Arrays, path: Path) -> None:
    odd = [
        f"{name} ({array.dtype})"
        for name, array in tensors.items()
        if not jnp.issubdtype(array.dtype, jnp.floating) and "num_batches" not in name
        if not name.endswith("/count")
    ]
    if odd:
        raise ConvertError(f"{path} holds tensors that are not floating point: {', '.join(odd)}")


def _structure(
    layout: Layout, found: RawCheckpoint, path: Path
) -> tuple[dict[str, Any], int | None]:
    """The fields of an `Info` that names and shapes tell, and rows of the position table.

    The names of mae_jax tell none of that: there the metadata is needed.
    """
    if layout.dialect == "mae_jax":
        missing = REQUIRED - DEFAULTS["mae_jax"].keys() - found.metadata.keys()
        if missing:
            raise ConvertError(
                f"{path} has the names of mae_jax, but lost its metadata: {', '.join(missing)}"
            )
        return {}, None
    places = {name: layout.match(name) for name in found.tensors}
    known = [place for place in places.values() if place]
    parts = {ours.split("/")[0] for ours, _ in known}
    shapes = _reference_shapes(layout, found.tensors, parts, path)
    depths = {
        tower: _depth({i for ours, i in known if ours.startswith(f"{tower}/blocks/")})
        for tower in ("encoder", "decoder")
    }
    width, channels, patch, _ = shapes["encoder/patch_embed/kernel"]
    facts: dict[str, Any] = {
        "width": width,
        "channels": channels,
        "patch": patch,
        "depth": depths["encoder"],
        "mlp_ratio": shapes["encoder/blocks/mlp/fc1/bias"][0] / width,
        "fc_norm": "fc_norm" in parts,
        "head_norm": "head_norm" in parts,
        "num_classes": shapes["head/bias"][0] if "head" in parts else 0,
    }
    if "fc_norm" in parts and "pool" not in found.metadata:
        facts["pool"] = "mean"
    if "decoder" in parts:
        facts["decoder_depth"] = depths["decoder"]
        facts["decoder_width"] = shapes["decoder/mask_token"][2]
        hidden = shapes["decoder/blocks/mlp/fc1/bias"][0]
        facts["decoder_mlp_ratio"] = hidden / facts["decoder_width"]
    return facts, shapes["encoder/pos_embed/table"][1]


def _depth(numbers: set[int]) -> int:
    """How many blocks there are, or should be where a few are missing; one stray adds none."""
    depth = 1 + max(numbers, default=-1)
    if 2 * len(numbers) > depth:
        return depth
    return next(number for number in range(depth + 1) if number not in numbers)


# The arrays whose shapes tell the size of everything else, and their number of axes.
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
    """Shapes of the arrays in _TELLING; if one is wrong, all that names alone show to be wrong."""
    shapes, odd = {}, []
    for ours, ndim in _REFERENCE_SHAPES.items():
        if ours.split("/")[0] in parts | {"encoder"}:
            name = layout.external_name(ours)
            if name not in tensors:
                odd.append(f"- {name} is missing")
            elif tensors[name].ndim != ndim or 0 in tensors[name].shape:
                odd.append(f"! {name} has shape {tensors[name].shape}, the model needs {ndim} axes")
            else:
                shapes[ours] = tensors[name].shape
    kernel = shapes.get("encoder/patch_embed/kernel", (1, 1, 1, 1))
    if kernel[2] != kernel[3]:
        odd.append(f"! {layout.external_name('encoder/patch_embed/kernel')} {kernel} is not square")
    if odd:
        odd += [
            f"+ {name} {array.shape} is not part of the model"
            for name, array in tensors.items()
            if not layout.match(name)
        ]
    _raise_mismatch(path, layout, odd)
    return shapes


def _image_size(
    facts: dict[str, Any], rows: int | None, grid: tuple[int, int] | None, path: Path
) -> tuple[int, int]:
    """Height and width in pixels: as told, else of as many rows of patches as columns."""
    patch, told = facts["patch"], facts.get("image_size")
    if told:
        if grid and (grid[0] * patch, grid[1] * patch) != told:
            raise ConvertError(f"{path} says that its image_size is {told}: no patches of {grid}")
        return told
    num_patches = (rows or 1) - 1
    side = math.isqrt(num_patches)
    grid = grid or (side, side)
    if grid[0] * grid[1] != num_patches or not num_patches:
        raise ConvertError(
            f"{path} has positions of {num_patches} patches, which are not {grid[0]} x {grid[1]}: "
            "say how many rows and columns with --grid-size ROWS,COLUMNS (in Python, grid=). A "
            "table without a row for the class token (timm's no_embed_class) is not supported"
        )
    return grid[0] * patch, grid[1] * patch


def _heads(facts: dict[str, Any], tower: str, asked: int | None, path: Path) -> int:
    """Heads of a tower ("" or "decoder_"): told, asked for, or of a known size; else 0."""
    told = facts.get(f"{tower}heads")
    if asked and told and asked != told:
        width, depth = (facts[f"{tower}{key}"] for key in ("width", "depth"))
        raise ConvertError(
            f"{path} says that it has {tower}heads={told}, not {asked} ({tower}width={width}, "
            f"{tower}depth={depth}, patch={facts['patch']})"
        )
    for size in map(vars, VARIANTS.values()):
        if all(size[f"{tower}{key}"] == facts.get(f"{tower}{key}") for key in ("width", "depth")):
            return told or asked or size[f"{tower}heads"]
    return told or asked or 0


def _check_heads(info: ModelInfo, towers: Collection[str], path: Path) -> None:
    unknown = {
        "encoder": (info.width, info.depth, "--num-heads") if not info.heads else None,
        "decoder": (info.decoder_width, info.decoder_depth, "--decoder-num-heads")
        if info.decoder_depth and not info.decoder_heads
        else None,
    }
    lacking = {tower: told for tower, told in unknown.items() if told and tower in towers}
    if lacking:
        sizes = " and ".join(f"{t} ({w} features x {d} blocks)" for t, (w, d, _) in lacking.items())
        flags = " and ".join(flag for _, _, flag in lacking.values())
        raise ConvertError(
            f"{path} does not tell how many attention heads its {sizes} has, and it is no known "
            f"size: say it with {flags} (in Python, heads= and decoder_heads=)"
        )


def _fill_defaults(layout: Layout, facts: dict[str, Any], path: Path) -> ModelInfo:
    """An `Info`, with the documented defaults of the dialect for what the file leaves unsaid."""
    defaults = dict(DEFAULTS[layout.dialect])
    for name in ("mean", "std"):
        defaults[name] = expand_stats(defaults[name], facts["channels"])
    absent = {name: value for name, value in defaults.items() if name not in facts}
    if absent:
        values = ", ".join(f"{name}={value}" for name, value in absent.items())
        log.info("%s does not tell, so the defaults of %s hold: %s", path, layout.dialect, values)
    facts = {"source": layout.dialect, **defaults, **facts}
    names, count = facts.get("class_names", ()), facts.get("num_classes", 0)
    if names and len(names) != count:
        if count:
            log.warning(
                "%s names %d classes for a head of %d; the names are not used",
                path,
                len(names),
                count,
            )
        facts["class_names"] = ()
    return ModelInfo(**facts)
