"""Draws the paper's figure 2 for images of yours.

python -m mae_jax.reconstruct IMAGE_OR_DIR... --checkpoint ANY --out grid.png
"""

from pathlib import Path

import jax
import numpy as np

from mae_jax import command_line
from mae_jax.convert.info import ConvertError
from mae_jax.data.sources import FileSource
from mae_jax.evals.reconstruct import Pictures, save_png
from mae_jax.tasks.masking import SAMPLERS

MOST = 64  # images in one picture


def main(argv: list[str]) -> None:
    parser = command_line.image_parser("mae_jax.reconstruct", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    parser.add_argument("--mask", choices=SAMPLERS, default="random")
    parser.add_argument(
        "--mask-ratio", type=float, help="share of patches hidden; the checkpoint's"
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, help="of the masks")
    parser.add_argument(
        "--stats",
        choices=("gt", "visible"),
        default="visible",
        help="brightness of normalised patches: their true one, or of visible neighbours (default)",
    )
    command_line.add_show(parser)
    arguments = parser.parse_args(argv)
    command_line.check_output("--out", arguments.out, ".png")
    source = FileSource(arguments.images)
    if len(source) > MOST:
        raise ConvertError(f"{len(source)} images are too many for one picture: {MOST} at most")
    model, params = command_line.load_model(arguments)
    show = command_line.shown(arguments, model)
    try:
        task = model.task(mask=arguments.mask, mask_ratio=arguments.mask_ratio)
    except ValueError as error:
        raise ConvertError(str(error)) from error
    images = model.read_images(arguments.images)
    mask = task.draw_mask(jax.random.key(arguments.seed), len(images))
    picture = Pictures(task, np.asarray(images), mask, arguments.stats, show).run(params)
    save_png(arguments.out, picture)
    print(f"{arguments.out}: {command_line.images_said(len(images))}")


if __name__ == "__main__":
    command_line.run(main)
