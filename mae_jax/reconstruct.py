"""Draw the reconstructions of images by a checkpoint (paper figure 2).

mae-jax reconstruct IMAGE_OR_DIR... --checkpoint ANY --out grid.png
"""

import argparse

import jax
import numpy as np

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import FileSource
from mae_jax.evaluate.figures import ReconstructionFigure, check_display_channels, save_png
from mae_jax.tasks.masking import SAMPLERS
from mae_jax.utils import cli

MAX_IMAGES = 64  # in one figure


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = convert_cli.image_parser("mae_jax.reconstruct", __doc__)
    parser.add_argument("--out", type=cli.path_argument, required=True, help="the figure, .png")
    parser.add_argument("--mask", choices=SAMPLERS, default="random")
    parser.add_argument(
        "--mask-ratio", type=float, help="fraction of patches to hide (the checkpoint's)"
    )
    parser.add_argument("--seed", type=cli.uint32, default=0, help="of the masks")
    parser.add_argument(
        "--stats",
        choices=("gt", "visible"),
        default="visible",
        help="brightness of normalized patches: ground truth, or of visible neighbors (default)",
    )
    convert_cli.add_show(parser)
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    cli.check_output("--out", arguments.out, ".png")
    source = FileSource(arguments.images)
    if len(source) > MAX_IMAGES:
        raise ConvertError(
            f"{len(source)} images are too many for one figure: {MAX_IMAGES} at most"
        )
    model, params = convert_cli.load_model(arguments)
    show = check_display_channels(arguments.show, model.info.channels)
    images = model.read_images(arguments.images)
    task = model.task(mask=arguments.mask, mask_ratio=arguments.mask_ratio, dtype=images.dtype)
    mask = task.sample_mask(jax.random.key(arguments.seed), len(images))
    figure = ReconstructionFigure(task, np.asarray(images), mask, arguments.stats, show).run(params)
    save_png(arguments.out, figure)
    print(f"{arguments.out}: {cli.pluralize(len(images), 'image')}")


if __name__ == "__main__":
    cli.run_command(main)
