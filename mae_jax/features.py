"""Write the encoder's features of images, without masking, to a .npz file.

mae-jax features IMAGE_OR_DIR... --checkpoint ANY --out features.npz
"""

import argparse
from functools import partial

import jax
import numpy as np
from jaxtyping import Float, UInt8

from mae_jax.convert import cli as convert_cli
from mae_jax.data.sources import FileSource
from mae_jax.evaluate.figures import check_display_channels, image_grid, save_png, to_rgb_uint8
from mae_jax.utils import cli
from mae_jax.utils.atomic import atomic_path

MAX_IMAGES = 16  # in the attention figure


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = convert_cli.image_parser("mae_jax.features", __doc__)
    convert_cli.add_batch_size(parser)
    parser.add_argument(
        "--out",
        type=cli.path_argument,
        required=True,
        help=".npz with `files`, `cls` and `mean` [n, d], and the features of the flags below",
    )
    parser.add_argument(
        "--layers",
        type=cli.int_list,
        default=[],
        metavar="3,6,9",
        help="also cls_3, mean_3, ... after these blocks, counted from 1, with the final norm",
    )
    parser.add_argument(
        "--grid", action="store_true", help="also `grid` [n, rows, columns, d], dense features"
    )
    parser.add_argument(
        "--attention",
        type=cli.path_argument,
        metavar="PNG",
        help="draw the cls token's attention in the last block, mean over heads; also `attention`",
    )
    convert_cli.add_show(parser)
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    cli.check_output("--out", arguments.out, ".npz")
    if arguments.attention:
        cli.check_output("--attention", arguments.attention, ".png")
    source = FileSource(arguments.images)
    model, params = convert_cli.load_model(arguments)
    options = dict(
        layers=tuple(arguments.layers),
        grid=arguments.grid,
        attention=arguments.attention is not None,
    )
    extract = jax.jit(partial(model.features, **options))
    features = convert_cli.map_images(
        model, source, arguments.batch_size, lambda images: extract(params, images)
    )
    convert_cli.warn_nonfinite(features)
    arrays = {"files": np.array([source.describe(i) for i in range(len(source))]), **features}

    with atomic_path(arguments.out) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    for name, array in arrays.items():
        print(f"{name:12} {array.dtype} {list(array.shape)}")
    if arguments.attention:
        show = check_display_channels(arguments.show, model.info.channels)
        images = model.read_images(source.files[:MAX_IMAGES])
        images = to_rgb_uint8(images, show, *model.info.stats(images.dtype))
        figure = attention_figure(images, features["attention"][:MAX_IMAGES])
        save_png(arguments.attention, figure)
    print(f"{arguments.out}: {cli.pluralize(len(source), 'image')}")


def attention_figure(
    images: UInt8[np.ndarray, "b h w c"], attention: Float[np.ndarray, "b y x"]
) -> UInt8[np.ndarray, "v u 3"]:
    """Return images, their attention (white is the maximum), and images weighted by it."""
    patch = images.shape[1] // attention.shape[1]
    mask = attention / attention.max(axis=(1, 2), keepdims=True)
    mask = mask.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    weighted = (images * (0.15 + 0.85 * mask)).astype(np.uint8)
    return image_grid(
        [images, (255 * mask).astype(np.uint8), weighted], ["image", "attention of cls", "both"]
    )


if __name__ == "__main__":
    cli.run_command(main)
