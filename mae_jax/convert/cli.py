"""Flags and helpers of the commands that load a checkpoint: features, predict, evaluate, ..."""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mae_jax.convert.key_maps import DIALECTS
from mae_jax.convert.locate import checkpoint_argument
from mae_jax.convert.model_info import TARGETS
from mae_jax.convert.pretrained import Params, PretrainedModel, load
from mae_jax.data.sources import FileSource, Source
from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.utils.cli import (
    index_list,
    int_pair,
    make_parser,
    path_text,
    positive_float,
    positive_int,
)
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")


def add_format_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for metadata that a checkpoint may lack."""
    group = parser.add_argument_group("metadata that the checkpoint may lack")
    group.add_argument(
        "--from", dest="dialect", choices=DIALECTS, help="its format (detected by default)"
    )
    group.add_argument("--num-heads", dest="heads", type=positive_int, help="encoder heads")
    group.add_argument("--decoder-num-heads", dest="decoder_heads", type=positive_int)
    group.add_argument("--layer-norm-eps", type=positive_float)
    group.add_argument("--target", choices=TARGETS, help="what its decoder predicts")
    group.add_argument("--pool", choices=("cls", "mean"), help="what its head takes")
    group.add_argument(
        "--grid-size",
        dest="grid_size",
        type=int_pair,
        metavar="ROWS,COLUMNS",
        help="patch grid, if it is not square",
    )
    group.add_argument("--ema", action="store_true", help="use the EMA parameters of a run")


def format_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_format_flags` as keyword arguments of `weights.read`."""
    names = ("dialect", "heads", "decoder_heads", "layer_norm_eps", "target", "pool", "ema")
    return {name: vars(arguments)[name] for name in names} | {"grid": arguments.grid_size}


def image_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with positional images and the checkpoint flags."""
    parser = make_parser(module, doc)
    parser.add_argument("images", nargs="+", type=path_text, help="image files, or folders of them")
    add_checkpoint(parser)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint and the flags of its model."""
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_argument,
        required=True,
        help="official, Hugging Face or timm file, a workdir, or org/name on the hub",
    )
    add_model_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model of a checkpoint."""
    parser.add_argument(
        "--image-size", type=int_pair, metavar="H,W", help="pixels (the checkpoint's)"
    )
    parser.add_argument("--channels", type=positive_int, help="of images (the checkpoint's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_format_flags(parser)


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add --show, for commands that draw images."""
    parser.add_argument(
        "--show",
        type=index_list,
        default=[0, 1, 2],
        metavar="3,2,1",
        help="channels to show as red, green, blue, of images with more than three (0,1,2)",
    )


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add --batch-size, for commands that take any number of images."""
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images (32)")


def load_model(arguments: argparse.Namespace) -> tuple[PretrainedModel, Params]:
    """Load the model of `arguments.checkpoint` and of the flags of `add_model_flags`."""
    return load(
        arguments.checkpoint,
        image_size=arguments.image_size,
        channels=arguments.channels,
        dtype=arguments.dtype,
        **format_kwargs(arguments),
    )


def map_images(
    model: PretrainedModel,
    source: FileSource,
    batch_size: int,
    function: Callable[[np.ndarray], dict[str, Any]],
) -> dict[str, np.ndarray]:
    """Apply a function to all images of a source in batches, with a progress bar."""

    batches = EvalBatches(len(source), lambda: model.batches(source, min(batch_size, len(source))))
    return extract_features(function, batches, show_progress=True).features


def warn_nonfinite(features: Mapping[str, np.ndarray]) -> None:
    """Warn of features with NaN or Inf."""
    for name, array in features.items():
        if not np.isfinite(array).all():
            log.warning("%s contains NaN or Inf: the weights may be corrupt", name)


def check_finite(features: Mapping[str, np.ndarray], source: Source) -> None:
    """Raise UserError if a feature is NaN or Inf, with the first image of which it is."""
    for name, array in features.items():
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        if bad.size:
            raise UserError(
                f"{name} of {source.describe(bad[0])} contains NaN or Inf, as of {bad.size} of "
                f"{len(array)} images: the weights may be corrupt, or too large for --dtype"
            )
