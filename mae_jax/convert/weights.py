"""Read weights from any format into our parameter names, adapt them, write them to any format."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from mae_jax.convert import io, state_dict
from mae_jax.convert.detect import detect
from mae_jax.convert.hf_preprocessor import processor_resizes
from mae_jax.convert.key_maps import DIALECTS
from mae_jax.convert.locate import locate
from mae_jax.convert.model_info import ConvertError, ModelInfo, expand_stats
from mae_jax.convert.preprocessing import as_crop, as_processor, with_image_size
from mae_jax.convert.state_dict import Arrays
from mae_jax.convert.weight_files import TORCH_SUFFIXES, is_bare
from mae_jax.models.patches import interpolate_pos_embed, patch_grid
from mae_jax.utils.atomic import check_writable
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import local_path
from mae_jax.utils.sides import sides_text

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class Weights:
    """The arrays of a checkpoint.

    arrays: by our names, as in "encoder/blocks/attn/qkv/kernel", in the dtypes of the file.
    layout: description of the naming scheme of the file.
    """

    arrays: Arrays
    info: ModelInfo
    layout: str = ""

    def count(self, part: str) -> int:
        """Return the number of parameters whose names begin with `part`."""
        return sum(array.size for name, array in self.arrays.items() if name.startswith(part))


def read(path: str | Path, *, ema: bool = False, **overrides: Any) -> Weights:
    """Read the weights of a checkpoint, strictly: every tensor is used.

    Args:
      path: a file, a directory, a workdir, an official name or a model of the hub, as in `locate`.
      ema: read the EMA parameters of a run instead of the last ones.
      overrides: metadata that the file lacks, as in `detect`.

    Raises:
      ConvertError: a tensor is missing, unexpected or of a wrong shape, or metadata is unknown.
    """
    path = locate(path).path
    raw = io.load(path, ema=ema)
    layout, info, shapes = detect(raw, path, **overrides)
    arrays = state_dict.import_state_dict(layout, shapes, raw.tensors)
    nonfinite = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if nonfinite:
        log.warning("%s contains NaN or Inf in %s", path, ", ".join(nonfinite))
    return Weights(arrays, info, str(layout))


def adapt(
    weights: Weights,
    *,
    channels: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Weights:
    """Adapt weights to another number of channels or image size, if given."""
    if channels is not None:
        weights = adapt_input_channels(weights, channels)
    return weights if image_size is None else resize_pos_embed(weights, image_size)


def resize_pos_embed(weights: Weights, image_size: tuple[int, int]) -> Weights:
    """Interpolate the positional embeddings to another image size (height and width, pixels).

    As in the reference: bicubic, a = -0.75, without antialiasing.
    """
    info = weights.info
    if image_size == info.image_size:
        return weights
    try:
        grid = patch_grid(image_size, info.patch)
    except UserError as error:
        raise ConvertError(error.problem, key=error.key, value=error.value) from error
    arrays = {
        name: interpolate_pos_embed(array[0], info.grid, grid, info.class_tokens)[None]
        if name.endswith("pos_embed/table")
        else array
        for name, array in weights.arrays.items()
    }
    info = with_image_size(info, image_size)
    return dataclasses.replace(weights, arrays=arrays, info=info)


def adapt_input_channels(weights: Weights, channels: int) -> Weights:
    """Adapt weights to another number of channels.

    To one channel, kernels of the patch embedding are summed over the old channels, so a gray image
    embeds as its RGB copy did. To n > 1, the old channels repeat in order, scaled by old / n. The
    decoder predicts the mean of the old channels, or repeats them.
    """
    info, old = weights.info, weights.info.channels
    if channels == old:
        return weights
    if channels < 1:
        raise ConvertError("must be at least 1", key="channels", value=channels)
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
    mean, std = (expand_stats(values, channels) for values in (info.mean, info.std))
    info = dataclasses.replace(info, channels=channels, mean=mean, std=std, bands=None)
    return dataclasses.replace(weights, arrays=arrays, info=info)


def encoder_only(weights: Weights) -> Weights:
    """Return the weights without their decoder."""
    arrays = {n: array for n, array in weights.arrays.items() if not n.startswith("decoder/")}
    info = dataclasses.replace(
        weights.info,
        decoder_width=0,
        decoder_depth=0,
        decoder_heads=0,
        target="unknown",
    )
    return dataclasses.replace(weights, arrays=arrays, info=info)


def without_head(weights: Weights) -> Weights:
    """Return the weights without the head of a segmentation model."""
    parts = ("head/", "head_norm/", "upsample/")
    arrays = {n: array for n, array in weights.arrays.items() if not n.startswith(parts)}
    info = dataclasses.replace(
        weights.info, pool="cls", head_norm=False, upsample_width=0, num_classes=0, class_names=()
    )
    return dataclasses.replace(weights, arrays=arrays, info=info)


def check_destination(path: Path, dialect: str, *, overwrite: bool) -> None:
    """Raise ConvertError if a path cannot be written, or would replace something by accident."""
    if dialect not in DIALECTS:
        raise ConvertError(f"must be one of {', '.join(DIALECTS)}", key="dialect", value=dialect)
    try:
        check_writable("destination", path)
    except UserError as error:
        raise ConvertError(str(error)) from error
    suffix = io.single_file_suffix(path)
    if path.exists() and path.is_file() != bool(suffix):
        kind = "file" if path.is_file() else "directory"
        raise ConvertError(f"{path} exists and is a {kind}: choose another path")
    if path.suffix.lower() in TORCH_SUFFIXES and not suffix:
        log.warning("%s becomes a directory: only .safetensors and .pth are single files", path)
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ConvertError(f"{path} exists: choose another path, or replace it with --overwrite")
    if path.is_dir():
        others = {*io.list_weight_files(path), *(p.name for p in path.glob("*.json"))}
        others -= {io.weights_name(dialect), *io.CONFIG_NAMES[dialect]}
        if others:
            raise ConvertError(
                f"{path} also contains {', '.join(sorted(others))}, which would be read with the "
                "new weights: remove it, or choose another directory"
            )


def write(weights: Weights, path: str | Path, dialect: str, *, overwrite: bool = False) -> None:
    """Write a file (.safetensors, .pth) or a directory in a format.

    Raises:
      ConvertError: the path exists, or the format cannot represent a part of the weights.
    """
    path = local_path(path)
    check_destination(path, dialect, overwrite=overwrite)
    if reason := _unsupported_reason(weights.info, dialect):
        raise ConvertError(reason)
    if lacks_decoder(dialect, weights.info) and weights.info.decoder_depth:
        log.warning(
            "%s has no decoder: its %s parameters are not written",
            "transformers' PixioModel" if dialect == "hf" else dialect,
            f"{weights.count('decoder/'):,}",
        )
        weights = encoder_only(weights)
    info = weights.info
    _warn_lossy(info, path, dialect)
    layout = state_dict.select_layout(dialect, weights.arrays, pixio=info.is_pixio)
    tensors = state_dict.export_state_dict(layout, dict(weights.arrays), info.patch)
    io.save(path, dialect, tensors, info)
    megabytes = sum(array.nbytes for array in tensors.values()) / 1e6
    log.info("wrote %s: %s, %d tensors, %.1f MB", path, layout, len(tensors), megabytes)


def lacks_decoder(dialect: str, info: ModelInfo) -> bool:
    """Return whether a format has no place for a decoder of the weights."""
    return dialect == "timm" or (dialect == "hf" and info.is_pixio)


def _unsupported_reason(info: ModelInfo, dialect: str) -> str | None:
    """Return why the code of a format could not run the weights; None if it can."""
    if dialect == "mae_jax":
        return None
    if info.segments:
        return (
            f"{dialect} has no segmentation head; --to mae_jax has, and --encoder-only converts "
            "the encoder without it"
        )
    if info.pool == "attention":
        return f"{dialect} has no learned attention pooling; --to mae_jax has"
    if reason := _unsupported_tokens(info, dialect):
        return reason
    if info.head_norm and dialect != "official":
        return f"{dialect} has no BatchNorm in a linear probe's head; --to official has"
    if dialect == "official" and info.fc_norm and info.pool == "cls":
        return "the official code has fc_norm only after the mean of patches; --to timm has both"
    if dialect == "hf" and info.fc_norm:
        return (
            "transformers' ViTForImageClassification takes the cls token after the last norm; this "
            "model pools its patches and normalizes afterwards (fc_norm), as --to timm does"
        )
    if dialect != "timm" and info.num_classes and info.pool == "mean" and not info.fc_norm:
        return f"{dialect} has no head over the mean of the patches without fc_norm; --to timm has"
    square_only = dialect in ("official", "pixio") or (dialect == "hf" and not info.num_classes)
    if square_only and not isinstance(info.patch, int):
        others = "--to mae_jax has" if info.is_pixio else "--to timm (the encoder) and mae_jax have"
        return (
            f"the code of {dialect} has square patches only, not {sides_text(info.patch)} pixels: "
            f"{others} others"
        )
    if square_only and info.image_size[0] != info.image_size[1]:
        return (
            f"the code of {dialect} takes square images only, not {info.image_size}: use "
            "--image-size, or another format"
        )
    return None


def _unsupported_tokens(info: ModelInfo, dialect: str) -> str | None:
    """Return why a format of MAE cannot represent a model of Pixio, or the other way round."""
    if dialect in ("official", "timm") and info.class_tokens > 1:
        return (
            f"{dialect} has one class token, not {info.class_tokens}: --to pixio and hf have more"
        )
    if dialect == "pixio" and not info.is_pixio:
        return "pixio is for models with several class tokens: --to official is for MAE"
    pixio = dialect in ("pixio", "hf") and info.is_pixio
    if pixio and (info.num_classes or info.fc_norm):
        model = "Pixio's code" if dialect == "pixio" else "transformers' PixioModel"
        return f"{model} has neither a head nor fc_norm; --to mae_jax has"
    if pixio and dialect == "hf" and info.mlp_ratio % 1:
        return f"transformers' PixioModel has whole numbers as mlp_ratio, not {info.mlp_ratio:g}"
    return None


def compatible_formats(info: ModelInfo) -> list[str]:
    """Return the formats that can represent the weights (without the decoder: `lacks_decoder`)."""
    return [dialect for dialect in DIALECTS if _unsupported_reason(info, dialect) is None]


def _warn_lossy(info: ModelInfo, path: Path, dialect: str) -> None:
    """Warn of what another program will assume when it opens the file."""
    if dialect in ("official", "pixio", "timm") and info.layer_norm_eps != 1e-6:
        log.warning(
            "these weights were trained with layer_norm_eps=%g, which %s cannot store: its code "
            "uses 1e-06",
            info.layer_norm_eps,
            dialect,
        )
    _warn_lossy_preprocessing(info, dialect)
    if dialect == "hf" and info.decoder_depth and info.target == "unknown":
        log.warning(
            "it is unknown whether the decoder predicts pixels or normalized pixels; config.json "
            "gets norm_pix_loss=false. Set --target"
        )
    suffix = io.single_file_suffix(path)
    if dialect == "hf" and suffix:
        log.warning("transformers loads directories; %s has no config.json next to it", path)
    pth = suffix or Path(io.weights_name(dialect)).suffix
    if pth == ".pth" and is_bare(dialect, info):
        log.warning(
            "%s has tensors only, as %s expects: the numbers of heads, the preprocessing and "
            "the class names are not in it. %s keeps them",
            path,
            dialect,
            ".safetensors" if dialect == "pixio" else "A directory or .safetensors",
        )


def _warn_lossy_preprocessing(info: ModelInfo, dialect: str) -> None:
    """Warn of preprocessing that the config files of a format cannot express."""
    for name, text in vars(info.read_options).items():
        if text is not None and dialect != "mae_jax":
            log.warning(
                "programs of the format %s do not know data.%s=%s: give them images that are read "
                "in this way%s",
                dialect,
                name,
                text,
                ", with the mean where there is no data" if name == "nodata" else "",
            )
    if dialect == "hf" and not processor_resizes(info):
        log.warning(
            "transformers resizes only gray and RGB images of 8 bits: preprocessor_config.json has "
            "do_resize=false, so pass it arrays of %d x %d",
            *info.image_size,
        )
    elif dialect == "hf" and as_processor(info) is None:
        log.warning(
            "preprocessor_config.json cannot express the preprocessing %r of these weights: it "
            "resizes full images, without keeping their aspect ratio",
            info.resize,
        )
    if dialect == "timm" and as_crop(info) is None:
        log.warning(
            "timm's pretrained_cfg cannot express the size=%s and crop_size=%s of these weights: "
            "it gets crop_mode=squash",
            dict(info.size),
            info.crop_size,
        )
