"""What the commands that take a checkpoint and images have in common."""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax import console
from mae_jax.convert.info import TARGETS, ConvertError
from mae_jax.convert.layouts import DIALECTS
from mae_jax.data.sources import DataError, FileSource
from mae_jax.evals.extract import Images, extract
from mae_jax.evals.reconstruct import check_shown
from mae_jax.pretrained import Params, Pretrained, load
from mae_jax.xla import keep_compiled

log = logging.getLogger("mae_jax")

# Errors from below name config keys; here the same values are flags. They also name files and
# quote code, which stay as they are: model.safetensors, torch.save(model.state_dict(), ...).
FLAGS = {
    r"mask\.ratio=": "--mask-ratio ",
    r"mask\.kind=": "--mask ",
    r"model\.image_size=": "--image-size ",
    r"model\.patch=": "",
    r"model\.channels=": "--channels ",
    r"model\.(?=\w+=)": "",
    r"eval\.show_channels=": "--show ",
    r"data\.image_feature names it": "--image-feature names it",
    r"data\.path(?![\w/.])": "--data-dir",
}


def count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def seed(text: str) -> int:
    """A number from 0 to 2^32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {2**32 - 1}")
    return int(text)


def pair(text: str) -> tuple[int, int]:
    """ "224" or "224,160": height and width, or rows and columns."""
    numbers = integers(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor two")
    return numbers[0], numbers[-1]


def integers(text: str) -> list[int]:
    """ "3,6,9" as a list of numbers from 1 up."""
    return [count(part) for part in text.split(",")]


def channels(text: str) -> list[int]:
    """ "3,2,1" as a list of numbers from 0 up."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers from 0 up")
    return [int(part) for part in parts]


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser that describes itself by the first line of a module's docstring."""
    description = str(doc).splitlines()[0]
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, allow_abbrev=False
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Flags for what a checkpoint does not tell of itself."""
    group = parser.add_argument_group("what the checkpoint does not tell")
    group.add_argument(
        "--from", dest="dialect", choices=DIALECTS, help="its dialect (recognised unless given)"
    )
    group.add_argument("--num-heads", dest="heads", type=count, help="of the encoder")
    group.add_argument("--decoder-num-heads", dest="decoder_heads", type=count)
    group.add_argument("--layer-norm-eps", type=positive)
    group.add_argument("--target", choices=TARGETS, help="what its decoder predicts")
    group.add_argument("--pool", choices=("cls", "mean"), help="what its head takes")
    group.add_argument(
        "--grid-size",
        dest="grid_size",
        type=pair,
        metavar="ROWS,COLUMNS",
        help="of patches, if they are not square",
    )
    group.add_argument("--ema", action="store_true", help="of a run, the averaged parameters")


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_reading`, for `weights.read`."""
    names = ("dialect", "heads", "decoder_heads", "layer_norm_eps", "target", "pool", "ema")
    return {name: vars(arguments)[name] for name in names} | {"grid": arguments.grid_size}


def image_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with images, --checkpoint and all that goes with them."""
    parser = make_parser(module, doc)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    add_checkpoint(parser)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, and how its model is to compute."""
    parser.add_argument(
        "--checkpoint", required=True, help="official, HuggingFace or timm, or a workdir of ours"
    )
    parser.add_argument(
        "--image-size", type=pair, metavar="H,W", help="pixels; the checkpoint's unless given"
    )
    parser.add_argument("--channels", type=count, help="of images; the checkpoint's unless given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_reading(parser)


def add_show(parser: argparse.ArgumentParser) -> None:
    """--show, for commands that draw images."""
    parser.add_argument(
        "--show",
        type=channels,
        default=[0, 1, 2],
        metavar="3,2,1",
        help="channels as red, green, blue, of images with more than three (0,1,2)",
    )


def shown(arguments: argparse.Namespace, model: Pretrained) -> tuple[int, ...]:
    """The channels of --show that the images of a model have; ConvertError for others."""
    try:
        return check_shown(arguments.show, model.info.channels)
    except ValueError as error:
        raise ConvertError(str(error)) from error


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """--batch-size, for commands that take any number of images."""
    parser.add_argument("--batch-size", type=count, default=32, help="images at once (32)")


def load_model(arguments: argparse.Namespace) -> tuple[Pretrained, Params]:
    """The model that the arguments of an `image_parser` ask for."""
    return load(
        arguments.checkpoint,
        image_size=arguments.image_size,
        channels=arguments.channels,
        dtype=arguments.dtype,
        **reading(arguments),
    )


def warn_of_damage(features: Mapping[str, np.ndarray]) -> None:
    """Says which features hold numbers that are not finite."""
    for name, array in features.items():
        if not np.isfinite(array).all():
            log.warning("%s holds numbers that are not finite: the weights may be damaged", name)


def over_images(
    model: Pretrained,
    source: FileSource,
    batch_size: int,
    function: Callable[[np.ndarray], dict[str, Any]],
) -> dict[str, np.ndarray]:
    """function's arrays for all images of a source, computed in batches, with a progress bar."""

    def read() -> Iterator[dict[str, np.ndarray]]:
        return console.progress(
            model.batches(source, min(batch_size, len(source))),
            len(source),
            count=console.valid_images,
        )

    return extract(function, Images(len(source), read))[0]


def check_output(flag: str, path: Path, suffix: str) -> None:
    """ConvertError, before any work is done, unless a file of that name can be written."""
    if path.suffix != suffix:
        raise ConvertError(f"{flag} {path} must end in {suffix}")
    if path.is_dir():
        raise ConvertError(f"{flag} {path} is a directory")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConvertError(f"{flag} {path}: {above} is a file, not a directory")
    if not os.access(above, os.W_OK):
        raise ConvertError(f"{flag} {path}: {above} may not be written to")


def images_said(number: int) -> str:
    """ "1 image", "2 images"."""
    return f"{number} image{'' if number == 1 else 's'}"


def as_flags(message: str) -> str:
    """A message from below with flags in place of keys."""
    for key, flag in FLAGS.items():
        message = re.sub(rf"(?<![\w./-]){key}", flag, message)  # no part of a longer name
    return message


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command; bad input ends it with one sentence and exit code 2."""
    console.setup_logging()
    keep_compiled()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes what is half written
    try:
        main(sys.argv[1:])
    except (ConvertError, DataError, OSError) as error:
        print(f"error: {as_flags(str(error))}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("error: there is not enough memory for this", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
