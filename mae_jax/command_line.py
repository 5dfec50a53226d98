"""What the commands that take a checkpoint and images have in common."""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mae_jax import console
from mae_jax.convert.info import TARGETS, ConvertError
from mae_jax.convert.mapping import DIALECTS
from mae_jax.data.loader import ordered_batches
from mae_jax.data.sources import DataError, FileSource
from mae_jax.pretrained import Params, Pretrained, load


def pair(text: str) -> tuple[int, int]:
    """ "224" or "224,160": height and width, or rows and columns."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or two with a comma between")
    return numbers[0], numbers[-1]


def integers(text: str) -> list[int]:
    """ "3,6,9" as a list."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers, as in 3,6,9"
        ) from None


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Flags for what a checkpoint does not tell of itself."""
    group = parser.add_argument_group("what the checkpoint does not tell")
    group.add_argument(
        "--from", dest="dialect", choices=DIALECTS, help="its dialect (recognised unless given)"
    )
    group.add_argument("--num-heads", dest="heads", type=int, help="of the encoder")
    group.add_argument("--decoder-num-heads", dest="decoder_heads", type=int)
    group.add_argument("--layer-norm-eps", type=float)
    group.add_argument("--target", choices=TARGETS, help="what its decoder predicts")
    group.add_argument(
        "--grid-size", type=pair, metavar="ROWS,COLUMNS", help="of patches, if they are not square"
    )
    group.add_argument("--ema", action="store_true", help="of a run, the averaged parameters")


def reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `add_reading`, for `weights.read`."""
    names = ("dialect", "heads", "decoder_heads", "layer_norm_eps", "target", "ema")
    return {name: vars(arguments)[name] for name in names} | {"grid": arguments.grid_size}


def image_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with images, --checkpoint and all that goes with them."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument(
        "--checkpoint", required=True, help="official, HuggingFace or timm, or a workdir of ours"
    )
    parser.add_argument(
        "--image-size", type=pair, metavar="H,W", help="pixels; the checkpoint's unless given"
    )
    parser.add_argument("--channels", type=int, help="of images; the checkpoint's unless given")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (32)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_reading(parser)
    return parser


def load_model(arguments: argparse.Namespace) -> tuple[Pretrained, Params]:
    """The model that the arguments of an `image_parser` ask for."""
    if arguments.batch_size < 1:
        raise ConvertError(f"--batch-size {arguments.batch_size} must be at least 1")
    return load(
        arguments.checkpoint,
        image_size=arguments.image_size,
        channels=arguments.channels,
        dtype=arguments.dtype,
        **reading(arguments),
    )


def over_images(
    model: Pretrained,
    source: FileSource,
    batch_size: int,
    function: Callable[[np.ndarray], dict[str, Any]],
) -> Iterator[dict[str, np.ndarray]]:
    """function's arrays for batches of images, without the rows that only fill up the last one."""
    batches = ordered_batches(source, model.transform, min(batch_size, len(source)))
    batches = console.progress(batches, len(source), lambda batch: batch["valid"].sum())
    for batch in batches:
        made = function(batch["image"])
        yield {name: np.asarray(array)[batch["valid"]] for name, array in made.items()}


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a command; bad input ends it with one sentence and exit code 2."""
    console.setup_logging()
    try:
        main(sys.argv[1:])
    except (ConvertError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
