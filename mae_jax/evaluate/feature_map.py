"""A 2-D map of the features of images: PCA, UMAP or t-SNE, colored by folder."""

import colorsys
import importlib
import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax.data.sources import printable_path
from mae_jax.evaluate.feature_figures import LINE, Tile, shorten
from mae_jax.evaluate.pca import project_all
from mae_jax.utils.errors import UserError

PACKAGES = {"pca": ("numpy", "numpy"), "umap": ("umap", "umap-learn")}
PACKAGES["tsne"] = ("sklearn", "scikit-learn")  # method -> module and package
MIN_IMAGES = 3
COMPONENTS = 50  # that UMAP and t-SNE start from, which is faster
SIDE, MARGIN, LEGEND = 1000, 40, 260  # pixels
SMOOTH = 2  # points are drawn so many times larger
THUMBNAIL = 44  # pixels
MAX_LEGEND = (SIDE - 2 * MARGIN) // LINE - 2
NO_CLASS = (140, 140, 140)


def image_classes(files: Sequence[Path]) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """Return classes and the class of each file: its folder below the one that all have in common.

    The class is -1 for files directly in that folder.
    """
    folders = [file.absolute().parent for file in files]
    common = Path(os.path.commonpath(folders))
    parts = [folder.relative_to(common).parts for folder in folders]
    classes = sorted({part[0] for part in parts if part}, key=os.fsencode)
    index = {name: number for number, name in enumerate(classes)}
    labels = np.array([index[part[0]] if part else -1 for part in parts])
    return [printable_path(Path(name)) for name in classes], labels


def check_map(
    method: str, files: Sequence[Path], thumbnails: bool
) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """Return `image_classes` of the files of a map.

    Raises:
      UserError: the package of the method is missing, or there are too few images or no classes.
    """
    module, package = PACKAGES[method]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"--map-method {method} needs a package: pip install {package}")
    if len(files) < MIN_IMAGES:
        raise UserError(f"--map needs at least {MIN_IMAGES} images, but there are {len(files)}")
    classes, labels = image_classes(files)
    if not classes and not thumbnails:
        raise UserError(
            f"--map has no classes to color: all {len(files)} images are in the folder "
            f"{printable_path(files[0].parent)}. Give a folder with one folder per class, or add "
            "--thumbnails"
        )
    return classes, labels


def embed(vectors: Float[np.ndarray, "n d"], method: str) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Return a position for each vector, and a title; deterministic.

    UMAP (McInnes et al. 2018) and t-SNE (van der Maaten and Hinton 2008) begin with the first two
    of 50 principal components.

    Raises:
      UserError: the vectors are all the same.
    """
    count = len(vectors)
    points, pca = project_all(vectors, COMPONENTS, f"--map: the {count} images")
    start = points[:, :2] / np.abs(points[:, :2]).max()
    if method == "pca":
        shares = pca.deviations[:2] ** 2 / pca.variance
        return points[:, :2], "PCA, {:.0%} + {:.0%} of the variance".format(*shares)
    if method == "umap":
        neighbors = min(15, count - 1)
        umap = importlib.import_module("umap").UMAP(
            n_neighbors=neighbors, init=10 * start, random_state=0, n_jobs=1
        )
        return umap.fit_transform(points), f"UMAP, {neighbors} neighbors"
    perplexity = min(30.0, (count - 1) / 3)
    tsne = importlib.import_module("sklearn.manifold").TSNE(
        perplexity=perplexity, init=1e-4 * start / start[:, 0].std(), random_state=0
    )
    return tsne.fit_transform(points), f"t-SNE, perplexity {perplexity:.3g}"


def to_pixels(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Scale points to the map, with one scale for both axes; the second axis points up."""
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high - low).max() * [1, -1]
    return SIDE / 2 + points * (SIDE - 2 * MARGIN - THUMBNAIL)


def select_thumbnails(pixels: Float[np.ndarray, "n 2"]) -> list[int]:
    """Return images whose thumbnails do not overlap, of a fixed order as many as there is room."""
    taken: dict[tuple[int, int], int] = {}  # by cell: one has room for one thumbnail
    for index in np.random.default_rng(0).permutation(len(pixels)):
        x, y = (pixels[index] // THUMBNAIL).astype(int)
        near = [
            taken[cell]
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            if (cell := (x + dx, y + dy)) in taken
        ]
        if all(np.abs(pixels[index] - pixels[other]).max() >= THUMBNAIL for other in near):
            taken[x, y] = int(index)
    return sorted(taken.values())


def map_figure(
    pixels: Float[np.ndarray, "n 2"],
    classes: Sequence[str],
    labels: Int[np.ndarray, " n"],
    title: str,
    thumbnails: Mapping[int, Tile],
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw a point in the color of its class for each image, thumbnails by image, and a legend."""
    colors = [*map(_color, range(len(classes))), NO_CLASS]  # the last is that of class -1
    sheet = Image.new("RGB", (SMOOTH * SIDE, SMOOTH * SIDE), "white")
    draw = ImageDraw.Draw(sheet)
    radius = SMOOTH * float(np.clip(100 / len(pixels) ** 0.5, 1.5, 5))
    for index in np.random.default_rng(0).permutation(len(pixels)):  # so that no class is on top
        draw.circle(tuple(SMOOTH * pixels[index]), radius, fill=colors[labels[index]])
    sheet = sheet.resize((SIDE, SIDE), Image.Resampling.BOX)
    draw = ImageDraw.Draw(sheet)
    for index, tile in thumbnails.items():
        left, top = (
            round(center - side / 2) for center, side in zip(pixels[index], tile.shape[1::-1])
        )
        sheet.paste(Image.fromarray(tile), (left, top))
        box = (left, top, left + tile.shape[1] - 1, top + tile.shape[0] - 1)
        draw.rectangle(box, outline=colors[labels[index]], width=2)
    full = Image.new("RGB", (SIDE + (LEGEND if classes else 0), SIDE), "white")
    full.paste(sheet)
    draw, font = ImageDraw.Draw(full), ImageFont.load_default(14)
    draw.text((MARGIN / 2, MARGIN / 4), title, fill="black", font=font)
    for number, (color, text) in enumerate(_legend(classes, labels, colors)):
        left, top = SIDE, MARGIN + number * LINE
        draw.rectangle((left, top + 3, left + 11, top + 14), fill=color)
        text = shorten(text, font, LEGEND - 30)
        draw.text((left + 20, top), text, fill="black", font=font)
    return np.asarray(full)


def _legend(
    classes: Sequence[str], labels: Int[np.ndarray, " n"], colors: Sequence[tuple[int, int, int]]
) -> list[tuple[tuple[int, int, int], str]]:
    """Return color and text of the largest classes, in the order of their names."""
    if not classes:
        return []
    counts = Counter(labels.tolist())
    largest = sorted(n for n, _ in counts.most_common(MAX_LEGEND))
    names = [*classes, "(no class)"]
    lines = [(colors[n], f"{names[n]} ({counts[n]:,})") for n in largest]
    if len(counts) > len(largest):
        lines.append(((255, 255, 255), f"and {len(counts) - len(largest):,} smaller classes"))
    return lines


def _color(number: int) -> tuple[int, int, int]:
    """Return the color of a class: hues by the golden ratio, of three lightnesses."""
    hue, lightness = number * 0.618034 % 1, (0.45, 0.62, 0.3)[number % 3]
    red, green, blue = (round(255 * x) for x in colorsys.hls_to_rgb(hue, lightness, 0.75))
    return red, green, blue
