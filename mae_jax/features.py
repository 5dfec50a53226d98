"""Write the encoder's features of images, without masking, to a .npz file, and draw them.

mae-jax features IMAGE_OR_DIR... --checkpoint ANY --out features.npz [--pca p.png] [--map m.png]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.pretrained import POOLED, Params, PretrainedModel
from mae_jax.data.sources import FileSource
from mae_jax.evaluate import feature_figures, feature_map
from mae_jax.evaluate.figures import check_display_channels, save_png, to_rgb_uint8
from mae_jax.evaluate.pca import PatchMoments, fit_colors, select_border
from mae_jax.utils import cli
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.errors import UserError

MAX_IMAGES = 16  # in the pictures of patches and of attention
FIGURES = ("pca", "map", "attention")  # flags of pictures


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = convert_cli.image_parser("mae_jax.features", __doc__)
    convert_cli.add_batch_size(parser)
    parser.add_argument(
        "--out",
        type=cli.path_argument,
        help=".npz with `files`, `cls` and `mean` [n, d] (with several class tokens, these and "
        "`global`, too), and the features of the flags below",
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
    _add_figures(parser)
    convert_cli.add_show(parser)
    return parser


def _add_figures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "pictures",
        "Memory does not grow with the number of images, but for cls and mean (of several class "
        "tokens these, too, and global), 8 d bytes of each "
        "image and layer (614 MB for 100,000 images and d = 768), and for `attention`, 4 bytes of "
        f"each patch. Pictures of patches and attention show the first {MAX_IMAGES} images.",
    )
    group.add_argument(
        "--attention",
        type=cli.path_argument,
        metavar="PNG",
        help="draw the cls token's attention in the last block, mean over heads; also `attention`",
    )
    group.add_argument(
        "--attention-blocks",
        type=cli.int_list,
        default=[],
        metavar="1,6,12",
        help="of these blocks instead, counted from 1",
    )
    group.add_argument(
        "--attention-heads", choices=("mean", "all"), default="mean", help="of every head (mean)"
    )
    group.add_argument(
        "--pca",
        type=cli.path_argument,
        metavar="PNG",
        help="draw the first three principal components of the patches of all images as red, "
        "green and blue; of each of --layers, or of the last",
    )
    group.add_argument(
        "--foreground",
        action="store_true",
        help="of the patches on one side of the mean along the first component only, where the "
        "border of the images is not; reads the images twice",
    )
    group.add_argument(
        "--map",
        type=cli.path_argument,
        metavar="PNG",
        help="draw a point for each image, in the color of its folder",
    )
    group.add_argument(
        "--map-method", choices=feature_map.PACKAGES, default="pca", help="of --map (pca)"
    )
    group.add_argument("--map-features", choices=POOLED, default="mean", help="of --map (mean)")
    group.add_argument("--thumbnails", action="store_true", help="draw images in --map, too")


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    _check_flags(arguments)
    source = FileSource(arguments.images)
    if arguments.map:
        feature_map.check_map(arguments.map_method, source.files, arguments.thumbnails)
    model, params = convert_cli.load_model(arguments)
    model.check_layers([*arguments.layers, *arguments.attention_blocks])
    model.check_pooled(arguments.map_features)
    show = check_display_channels(arguments.show, model.info.channels)
    extraction = _Extraction(arguments, source, model, params, show)
    features = extraction.features()
    convert_cli.warn_nonfinite(features)
    arrays = {"files": np.array([source.describe(i) for i in range(len(source))]), **features}

    if arguments.out:
        with atomic_path(arguments.out) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    for name, array in arrays.items():
        print(f"{name:12} {array.dtype} {list(array.shape)}")
    for name in FIGURES:
        if path := vars(arguments)[name]:
            convert_cli.check_finite(features, source)
            save_png(path, getattr(extraction, f"draw_{name}")(features))
    for path in _outputs(arguments).values():
        print(f"{path}: {cli.pluralize(len(source), 'image')}")


def _outputs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Return the files to write, by flag."""
    return {f"--{name}": path for name in ("out", *FIGURES) if (path := vars(arguments)[name])}


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for outputs that cannot be written, and flags without their picture."""
    if not (outputs := _outputs(arguments)):
        raise UserError("nothing to write: set --out, --attention, --pca or --map")
    for flag, path in outputs.items():
        cli.check_output(flag, path, ".npz" if flag == "--out" else ".png")
    for flag, figure, is_set in (
        ("--attention-blocks", "--attention", arguments.attention_blocks),
        ("--attention-heads", "--attention", arguments.attention_heads != "mean"),
        ("--foreground", "--pca", arguments.foreground),
        ("--map-method", "--map", arguments.map_method != "pca"),
        ("--map-features", "--map", arguments.map_features != "mean"),
        ("--thumbnails", "--map", arguments.thumbnails),
    ):
        if is_set and figure not in outputs:
            raise UserError(f"{flag} is for a picture that is not drawn: add {figure} OUT.png")


@dataclass(frozen=True)
class _Extraction:
    """The features of images by a model, and their pictures; `show` are the channels to show."""

    arguments: argparse.Namespace
    source: FileSource
    model: PretrainedModel
    params: Params
    show: Sequence[int]

    @cached_property
    def extract(self) -> Callable[[np.ndarray], dict[str, Array]]:
        arguments = self.arguments
        options = dict(
            layers=tuple(arguments.layers),
            grid=arguments.grid or arguments.pca is not None,
            attention=arguments.attention is not None,
        )
        return partial(jax.jit(partial(self.model.features, **options)), self.params)

    @cached_property
    def patches(self) -> PatchMoments:
        grids = [f"grid_{layer}" for layer in self.arguments.layers] or ["grid"]
        return PatchMoments(grids if self.arguments.pca else [], len(self.source))

    @cached_property
    def border(self) -> PatchMoments:
        layers = self.patches.moments if self.arguments.foreground else []
        return PatchMoments(layers, len(self.source), select_border)

    def features(self) -> dict[str, np.ndarray]:
        """Return the features of all images, dense ones only with --grid, and add up moments."""

        def process(images: np.ndarray) -> dict[str, Array]:
            features = self.extract(images)
            self.patches.add(features)
            self.border.add(features)
            keep = lambda name: self.arguments.grid or not name.startswith("grid")
            return {name: array for name, array in features.items() if keep(name)}

        return self._map(process)

    def _map(self, process: Callable[[np.ndarray], dict[str, Array]]) -> dict[str, np.ndarray]:
        return convert_cli.map_images(self.model, self.source, self.arguments.batch_size, process)

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of the pictures of patches: as the model takes them, and as shown."""
        images = self.model.read_images(self.source.files[:MAX_IMAGES])
        return images, to_rgb_uint8(images, self.show, *self.model.info.stats(images.dtype))

    def draw_attention(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        images, shown = self._drawn
        blocks, heads = self.arguments.attention_blocks, self.arguments.attention_heads
        if not blocks and heads == "mean":
            return feature_figures.attention_figure(shown, features["attention"][:MAX_IMAGES])
        blocks = tuple(blocks) or (self.model.info.depth,)
        attention = jax.jit(partial(self.model.features, attention_blocks=blocks))
        attention = attention(self.params, images)
        maps = {block: np.asarray(attention[f"attention_{block}"]) for block in blocks}
        return feature_figures.head_figure(shown, maps, heads == "all")

    def draw_pca(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        images, shown = self._drawn
        second_pass = lambda add: self._map(lambda images: add(self.extract(images)) or {})
        colors = fit_colors(self.patches, self.border, second_pass)
        dense = self.extract(images)
        columns = {layer: color(dense[layer]) for layer, color in colors.items()}
        return feature_figures.pca_figure(shown, columns)

    def draw_map(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        arguments = self.arguments
        points, title = feature_map.embed(features[arguments.map_features], arguments.map_method)
        pixels = feature_map.to_pixels(points)
        thumbnails = {}
        if arguments.thumbnails:
            chosen = feature_map.select_thumbnails(pixels)
            files = [self.source.files[index] for index in chosen]
            side = feature_map.THUMBNAIL
            tiles = feature_figures.read_tiles(self.model, files, self.show, side)
            thumbnails = dict(zip(chosen, tiles))
        classes, labels = feature_map.image_classes(self.source.files)
        return feature_map.map_figure(pixels, classes, labels, title, thumbnails)


if __name__ == "__main__":
    cli.run_command(main)
