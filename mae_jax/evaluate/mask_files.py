"""Predicted masks as files: class numbers with a palette, and the colors over the image."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.decode import decode
from mae_jax.data.segmentation import CLASS_NAMES
from mae_jax.data.sources import FileSource
from mae_jax.evaluate.figures import check_display_channels, save_png, to_rgb_uint8
from mae_jax.evaluate.segmentation_figure import class_colors, color_mask
from mae_jax.models.segmentation import bilinear_weights
from mae_jax.utils import console
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.errors import UserError

BLOCK = 2**24  # logits to interpolate at a time


def write_masks(
    model: PretrainedModel,
    params: Params,
    source: FileSource,
    out: Path,
    names: Sequence[str],
    batch_size: int,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Write NAME_mask.png and NAME_overlay.png of every image at its own size, and classes.txt.

    A mask has the number of the class of every pixel, with a palette for up to 256 classes.

    Yields:
      The name of an image, and the fractions of its pixels by class name, the largest first.

    Raises:
      UserError: two images have the same name.
      mae_jax.data.sources.DataError: an image is bad.
    """
    _check_names(source)
    _check_folder(out, names)
    info = model.info
    show = check_display_channels((0, 1, 2), info.channels)

    @jax.jit
    def logits(params: Any, images: Array) -> Array:
        return model.logits(params, images)

    with atomic_path(out / CLASS_NAMES) as part:
        part.write_text(_to_lines(names))
    batches = model.batches(source, min(batch_size, len(source)))
    number = 0
    for batch in console.progress(batches, len(source), count=console.num_valid):
        for grid in np.asarray(logits(params, batch["image"]))[batch["valid"]]:
            encoded, file = source[number]["image"], source.files[number]
            image = decode(encoded, info.channels, info.exif, info.bit_depth, info.read_options)
            classes = pixel_classes(grid, (image.shape[0], image.shape[1]))
            rgb = to_rgb_uint8(image[None], show, *info.stats(image.dtype))[0]
            _write_mask(out / f"{file.stem}_mask.png", classes, len(names))
            save_png(out / f"{file.stem}_overlay.png", overlay(rgb, classes, len(names)))
            yield source.describe(number), _fractions(classes, names)
            number += 1


def _check_names(source: FileSource) -> None:
    seen: dict[str, Path] = {}
    for file in source.files:
        other = seen.setdefault(file.stem, file)
        if other != file:
            raise UserError(
                f"{other} and {file} would both be written to {file.stem}_mask.png: predict them "
                "with another --out each"
            )


def _check_folder(out: Path, names: Sequence[str]) -> None:
    """Raise UserError if a folder has other files than masks of the same classes."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    file = out / CLASS_NAMES
    if not file.is_file() or file.read_text() != _to_lines(names):
        raise UserError(
            f"--out {out} has files that are not predictions of the same classes: choose another "
            "folder"
        )


def _to_lines(names: Sequence[str]) -> str:
    return "".join(f"{name}\n" for name in names)


def pixel_classes(
    logits: Float[np.ndarray, "y x classes"], size: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """Return the class of every pixel by bilinear interpolation of logits to height and width."""
    rows, columns = (bilinear_weights(new, old) for new, old in zip(size, logits.shape))
    classes = np.empty(size, np.int32)
    step = max(BLOCK // (size[1] * logits.shape[-1]), 1)
    for begin in range(0, size[0], step):
        block = rows[begin : begin + step]
        used = np.flatnonzero(block.any(axis=0))
        scores = np.tensordot(block[:, used], np.matmul(columns, logits[used]), axes=1)
        classes[begin : begin + step] = scores.argmax(axis=-1)
    return classes


def overlay(
    image: UInt8[np.ndarray, "h w c"], classes: Int[np.ndarray, "h w"], num_classes: int
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the mean of an image, gray or RGB, and the colors of its classes."""
    colors = color_mask(classes, num_classes).astype(np.uint16)
    return ((image + colors) // 2).astype(np.uint8)


def _write_mask(path: Path, classes: Int[np.ndarray, "h w"], num_classes: int) -> None:
    if num_classes <= 256:
        image = Image.fromarray(classes.astype(np.uint8))
        image.putpalette(class_colors(num_classes).tobytes())
    else:
        image = Image.fromarray(classes.astype(np.uint16))
    with atomic_path(path) as part:
        image.save(part, "PNG")


def _fractions(classes: Int[np.ndarray, "h w"], names: Sequence[str]) -> dict[str, float]:
    counts = np.bincount(classes.ravel(), minlength=len(names))
    best = np.argsort(-counts, kind="stable")
    labels = [
        f"{name} (class {n})" if names.count(name) > 1 else name for n, name in enumerate(names)
    ]
    return {labels[int(n)]: float(counts[n] / classes.size) for n in best if counts[n]}
