"""MAE weights in our names: read from any dialect, adapted, written to any dialect."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from mae_jax.convert import files, mapping
from mae_jax.convert.info import (
    DEFAULTS,
    TARGETS,
    ConvertError,
    Info,
    for_channels,
    parameter_shapes,
)
from mae_jax.convert.mapping import Arrays, Layout
from mae_jax.models.patches import patch_grid, resample_position_table
from mae_jax.sizes import SIZES

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class Weights:
    """arrays: by our names, as in "encoder/blocks/attn/qkv/kernel", in the dtypes of the file."""

    arrays: Arrays
    info: Info

    def count(self, part: str) -> int:
        """Parameters whose names begin with `part`; running statistics are none."""
        return sum(
            array.size
            for name, array in self.arrays.items()
            if name.startswith(part) and not name.startswith("head_norm/")
        )


def read(path: str | Path, *, ema: bool = False, **reading: Any) -> Weights:
    """The weights in a file, a directory or a run, strictly: every tensor has its place.

    Args:
      ema: of a run, the average of the parameters instead of the last ones.
      reading: what the file does not tell, as in `identify`.

    Raises:
      ConvertError: anything is missing, unexpected, of a wrong shape, or cannot be known.
    """
    path = Path(path)
    found = files.load(path, ema=ema)
    layout, info, shapes = identify(found, path, **reading)
    arrays = mapping.to_ours(layout, shapes, found.tensors)
    bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if bad:
        log.warning("%s holds numbers that are not finite in %s", path, ", ".join(bad))
    return Weights(arrays, info)


def identify(
    found: files.Found,
    path: Path,
    *,
    dialect: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    layer_norm_eps: float | None = None,
    target: str | None = None,
    grid: tuple[int, int] | None = None,
    need_heads: bool = True,
) -> tuple[Layout, Info, mapping.Shapes]:
    """What tensors are, and the shapes of ours that they make; `path` is for messages.

    Args:
      dialect: "mae_jax", "official", "hf" or "timm"; None recognises it by the names of tensors.
      heads, decoder_heads: where the file does not tell, and the size is not a known one.
      layer_norm_eps, target: instead of what the file or its dialect says.
      grid: rows and columns of patches, where they are not as many and the file does not tell.
      need_heads: whether an unknown number of heads is an error.

    Raises:
      ConvertError: anything is missing, unexpected, of a wrong shape, or cannot be known.
    """
    if target is not None and target not in TARGETS:
        raise ConvertError(f"target={target!r}; use one of {', '.join(TARGETS)}")
    layout = mapping.recognise(found.tensors, dialect, str(path))
    log.info("%s is %s", path, layout)
    facts = found.facts | _structure(layout, found, path)
    facts["image_size"] = _image_size(facts, grid, path)
    facts["target"] = target or facts.get("target", "unknown")
    if layer_norm_eps is not None:
        facts["layer_norm_eps"] = layer_norm_eps
    facts["heads"] = _heads(facts, "heads", heads, path)
    if facts.get("decoder_depth"):
        facts["decoder_heads"] = _heads(facts, "decoder_heads", decoder_heads, path)
    info = _complete(layout, facts, path)
    if need_heads:
        _need_heads(info, path)
    try:
        shapes = parameter_shapes(info)
    except ValueError as error:
        raise ConvertError(f"{path}: {error}") from error
    _refuse(path, layout, mapping.check(layout, shapes, found.tensors, info.patch))
    return layout, info, shapes


def _refuse(path: Path, layout: Layout, lines: list[str]) -> None:
    if lines:
        listed = "\n  ".join(lines)
        raise ConvertError(f"{path} does not fit {layout}; nothing was read from it:\n  {listed}")


# The arrays whose shapes tell the size of everything else, and their number of axes.
_TELLING = {
    "encoder/cls_token": 3,
    "encoder/pos_embed/table": 3,
    "encoder/patch_embed/kernel": 4,
    "encoder/blocks/mlp/fc1/bias": 1,
    "decoder/mask_token": 3,
    "decoder/blocks/mlp/fc1/bias": 1,
    "head/bias": 1,
}


def _structure(layout: Layout, found: files.Found, path: Path) -> dict[str, Any]:
    """The fields of an `Info` that names and shapes tell, and "rows" of the position table."""
    if layout.dialect == "mae_jax":
        if not {"width", "patch", "image_size"} <= found.facts.keys():
            raise ConvertError(f"{path} has the names of mae_jax, but lost its metadata")
        return {}
    places = {name: layout.match(name) for name in found.tensors}
    known = [place for place in places.values() if place]
    parts = {ours.split("/")[0] for ours, _ in known}
    shapes = _telling_shapes(layout, found.tensors, parts, path)
    depths = {
        tower: 1 + max((i for ours, i in known if ours.startswith(f"{tower}/blocks/")), default=-1)
        for tower in ("encoder", "decoder")
    }
    width, channels, patch, _ = shapes["encoder/patch_embed/kernel"]
    facts: dict[str, Any] = {
        "width": width,
        "channels": channels,
        "patch": patch,
        "depth": depths["encoder"],
        "mlp_ratio": shapes["encoder/blocks/mlp/fc1/bias"][0] / width,
        "rows": shapes["encoder/pos_embed/table"][1],
        "fc_norm": "fc_norm" in parts,
        "head_norm": "head_norm" in parts,
        "num_classes": shapes["head/bias"][0] if "head" in parts else 0,
    }
    if "fc_norm" in parts:
        facts["pool"] = "mean"
    if "decoder" in parts:
        facts["decoder_depth"] = depths["decoder"]
        facts["decoder_width"] = shapes["decoder/mask_token"][2]
        hidden = shapes["decoder/blocks/mlp/fc1/bias"][0]
        facts["decoder_mlp_ratio"] = hidden / facts["decoder_width"]
    return facts


def _telling_shapes(
    layout: Layout, tensors: Arrays, parts: set[str], path: Path
) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in _TELLING; if one is wrong, all that names alone show to be wrong."""
    shapes, odd = {}, []
    for ours, ndim in _TELLING.items():
        if ours.split("/")[0] in parts | {"encoder"}:
            name = layout.first_of(ours)
            if name not in tensors:
                odd.append(f"- {name} is missing")
            elif tensors[name].ndim != ndim or 0 in tensors[name].shape:
                odd.append(f"! {name} has shape {tensors[name].shape}, the model needs {ndim} axes")
            else:
                shapes[ours] = tensors[name].shape
    kernel = shapes.get("encoder/patch_embed/kernel", (1, 1, 1, 1))
    if kernel[2] != kernel[3]:
        odd.append(f"! {layout.first_of('encoder/patch_embed/kernel')} {kernel} is not square")
    if odd:
        odd += [
            f"+ {name} {array.shape} is not part of the model"
            for name, array in tensors.items()
            if not layout.match(name)
        ]
    _refuse(path, layout, odd)
    return shapes


def _image_size(facts: dict[str, Any], grid: tuple[int, int] | None, path: Path) -> tuple[int, int]:
    """Height and width in pixels: as told, else of as many rows of patches as columns."""
    patch, told = facts["patch"], facts.get("image_size")
    num_patches = facts.get("rows", 1) - 1
    if grid is None and told:
        return told
    side = math.isqrt(num_patches)
    grid = grid or (side, side)
    if "rows" in facts and grid[0] * grid[1] != num_patches:
        raise ConvertError(
            f"{path} has positions of {num_patches} patches, which are not {grid[0]} x {grid[1]}: "
            "say how many rows and columns with --grid ROWS,COLUMNS"
        )
    return grid[0] * patch, grid[1] * patch


def _heads(facts: dict[str, Any], name: str, asked: int | None, path: Path) -> int:
    """A number of heads: told by the file, asked for, or of the known size; else 0."""
    told = facts.get(name)
    if asked and told and asked != told:
        raise ConvertError(f"{path} says that it has {name}={told}, not {asked}")
    prefix = name.removesuffix("heads")
    shape = facts.get(f"{prefix}width"), facts.get(f"{prefix}depth")
    known = {
        (vars(size)[f"{prefix}width"], vars(size)[f"{prefix}depth"]): vars(size)[name]
        for size in SIZES.values()
    }
    return told or asked or known.get(shape, 0)


def _need_heads(info: Info, path: Path) -> None:
    for part, shape, heads, flag in (
        ("encoder", (info.width, info.depth), info.heads, "--num-heads"),
        (
            "decoder",
            (info.decoder_width, info.decoder_depth),
            info.decoder_heads,
            "--decoder-num-heads",
        ),
    ):
        if shape[1] and not heads:
            raise ConvertError(
                f"{path} does not tell how many attention heads its {part} has, and {shape[0]} "
                f"features x {shape[1]} blocks is no known size: say it with {flag}"
            )


def _complete(layout: Layout, facts: dict[str, Any], path: Path) -> Info:
    """An `Info`, with the documented defaults of the dialect for what the file leaves unsaid."""
    defaults = dict(DEFAULTS[layout.dialect])
    for name in ("mean", "std"):
        defaults[name] = for_channels(defaults[name], facts["channels"])
    absent = {name: value for name, value in defaults.items() if name not in facts}
    if absent:
        values = ", ".join(f"{name}={value}" for name, value in absent.items())
        log.info("%s does not tell, so the defaults of %s hold: %s", path, layout.dialect, values)
    facts = {"dialect": layout.dialect, **defaults, **facts}
    facts.pop("rows", None)
    names = facts.get("class_names", ())
    if names and len(names) != facts.get("num_classes"):
        if facts.get("num_classes"):
            log.warning(
                "%s names %d classes for a head of %d; the names are not used",
                path,
                len(names),
                facts["num_classes"],
            )
        facts["class_names"] = ()
    for name in ("mean", "std"):
        if len(facts[name]) != facts["channels"]:
            raise ConvertError(f"{path}: {name}={facts[name]} for {facts['channels']} channels")
    return Info(**facts)


def with_image_size(weights: Weights, image_size: tuple[int, int]) -> Weights:
    """The same weights for images of another height and width: position tables are resampled.

    As in the reference: bicubic, a = -0.75, without antialiasing.
    """
    info = weights.info
    if image_size == info.image_size:
        return weights
    try:
        grid = patch_grid(image_size, info.patch)
    except ValueError as error:
        raise ConvertError(str(error)) from error
    arrays = {
        name: resample_position_table(array[0], info.grid, grid)[None]
        if name.endswith("pos_embed/table")
        else array
        for name, array in weights.arrays.items()
    }
    return Weights(arrays, dataclasses.replace(info, image_size=image_size))


def with_channels(weights: Weights, channels: int) -> Weights:
    """The same weights for images of another number of channels.

    To one channel, kernels of the patch embedding are summed over the old channels: a grey image
    embeds as its RGB copy did. To n > 1, the old channels repeat in order, scaled by old / n. The
    decoder predicts the mean of the old channels, or repeats them.
    """
    info, old = weights.info, weights.info.channels
    if channels == old:
        return weights
    if channels < 1:
        raise ConvertError(f"channels={channels} must be at least 1")
    order = np.arange(channels) % old
    arrays = dict(weights.arrays)

    name = "encoder/patch_embed/kernel"
    kernel = rearrange(arrays[name].astype(np.float32), "(pixel c) d -> pixel c d", c=old)
    one = kernel.sum(axis=1, keepdims=True)
    kernel = one if channels == 1 else kernel[:, order] * (old / channels)
    arrays[name] = rearrange(kernel, "pixel c d -> (pixel c) d").astype(arrays[name].dtype)

    for name in ("decoder/head/kernel", "decoder/head/bias"):
        if name in arrays:
            head = rearrange(arrays[name].astype(np.float32), "... (pixel c) -> ... pixel c", c=old)
            head = head.mean(axis=-1, keepdims=True) if channels == 1 else head[..., order]
            head = rearrange(head, "... pixel c -> ... (pixel c)")
            arrays[name] = head.astype(arrays[name].dtype)
    mean, std = (for_channels(values, channels) for values in (info.mean, info.std))
    return Weights(arrays, dataclasses.replace(info, channels=channels, mean=mean, std=std))


def encoder_only(weights: Weights) -> Weights:
    """The same weights without their decoder."""
    arrays = {n: array for n, array in weights.arrays.items() if not n.startswith("decoder/")}
    info = dataclasses.replace(
        weights.info,
        decoder_width=0,
        decoder_depth=0,
        decoder_heads=0,
        target="unknown",
    )
    return Weights(arrays, info)


def check_free(path: Path, *, overwrite: bool) -> None:
    """ConvertError if writing there would replace something that it must not."""
    if path.exists() and path.is_file() != (path.suffix in files.WRITTEN):
        kind = "file" if path.is_file() else "directory"
        raise ConvertError(f"{path} exists and is a {kind}: name another")
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ConvertError(f"{path} exists: name another, or replace it with --overwrite")


def write(weights: Weights, path: str | Path, dialect: str, *, overwrite: bool = False) -> None:
    """Writes a file (.safetensors, .pth) or a directory in a dialect; empties `weights.arrays`.

    Raises:
      ConvertError: the path exists, or the dialect has no place for a part of the weights.
    """
    path = Path(path)
    check_free(path, overwrite=overwrite)
    if dialect == "timm" and weights.info.decoder_depth:
        log.warning(
            "timm has no place for a decoder: its %.1f M parameters are left behind",
            weights.count("decoder/") / 1e6,
        )
        weights = encoder_only(weights)
    info = weights.info
    if reason := _why_not(info, dialect):
        raise ConvertError(reason)
    _warn_of_losses(info, path, dialect)
    layout = mapping.layout_for(dialect, weights.arrays)
    tensors = mapping.to_theirs(layout, weights.arrays, info.patch)
    if weights.arrays:
        raise ConvertError(f"{dialect} has no place for {', '.join(weights.arrays)}")
    files.save(path, dialect, tensors, info)
    megabytes = sum(array.nbytes for array in tensors.values()) / 1e6
    log.info("wrote %s: %s, %d tensors, %.1f MB", path, layout, len(tensors), megabytes)


def _why_not(info: Info, dialect: str) -> str | None:
    """Why a dialect's own code could not compute with the weights, if it could not."""
    if dialect == "mae_jax":
        return None
    if info.head_norm and dialect != "official":
        return (
            f"{dialect} has no place for the BatchNorm of a linear probe's head; --to official has"
        )
    if dialect == "hf" and info.fc_norm:
        return (
            "transformers' ViTForImageClassification takes the cls token after the last norm; this "
            "model pools its patches and normalises afterwards (fc_norm). --to timm has that"
        )
    if dialect != "timm" and info.num_classes and info.pool == "mean" and not info.fc_norm:
        return f"{dialect} has no head over the mean of the patches without fc_norm; --to timm has"
    if dialect == "official" and info.image_size[0] != info.image_size[1]:
        return (
            f"the official code has square images only, not {info.image_size}: use --image-size, "
            "or another dialect"
        )
    return None


def holders(info: Info) -> list[str]:
    """The dialects that have a place for the weights (timm: without the decoder)."""
    return [dialect for dialect in mapping.DIALECTS if _why_not(info, dialect) is None]


def _warn_of_losses(info: Info, path: Path, dialect: str) -> None:
    """Says what another program that opens the file will take for granted."""
    if dialect in ("official", "timm") and info.layer_norm_eps != 1e-6:
        log.warning(
            "these weights were trained with layer_norm_eps=%g, which %s cannot hold: its code "
            "computes with 1e-06",
            info.layer_norm_eps,
            dialect,
        )
    if dialect == "hf" and info.decoder_depth and info.target == "unknown":
        log.warning(
            "it is unknown whether the decoder predicts pixels or normalised pixels; config.json "
            "says norm_pix_loss=false. --target tells"
        )
    if dialect == "hf" and path.suffix in files.WRITTEN:
        log.warning("transformers opens directories; %s has no config.json beside it", path)
