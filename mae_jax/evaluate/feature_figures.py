"""Pictures of features: principal components of patches, attention, rows of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax.convert.pretrained import PretrainedModel
from mae_jax.data.sources import FileSource
from mae_jax.evaluate.figures import GAP, MIN_SIDE, image_grid, to_rgb_uint8
from mae_jax.models.patches import enlarge_grid

READ_BATCH = 16  # images in memory at a time
LINE = 18  # pixels

Tile = UInt8[np.ndarray, "h w 3"]


def read_tiles(
    model: PretrainedModel, files: Sequence[Path], show: Sequence[int], side: int | None = None
) -> list[Tile]:
    """Return images as the model sees them, in RGB; with `side`, of that longer side, in pixels."""
    source, tiles = FileSource(files), []
    for batch in model.batches(source, min(READ_BATCH, len(source))):
        images = batch["image"][batch["valid"]]
        images = to_rgb_uint8(images, show, *model.info.stats(images.dtype))
        tiles += [resize_tile(image, side) for image in images]
    return tiles


def resize_tile(image: UInt8[np.ndarray, "h w c"], side: int | None = None) -> Tile:
    """Return a gray or RGB image in RGB, of that longer side or large enough to be seen."""
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    height, width = image.shape[:2]
    scale = side / max(height, width) if side else max(1, -(-MIN_SIDE // min(height, width)))
    filter_ = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, filter_))


def tile_rows(rows: Sequence[Sequence[tuple[Tile, str]]]) -> UInt8[np.ndarray, "y x 3"]:
    """Draw rows of images of one size, each with its caption of up to two lines below."""
    height, width = rows[0][0][0].shape[:2]
    step_x, step_y = width + GAP, height + 2 * LINE + GAP
    size = GAP + max(map(len, rows)) * step_x, GAP + len(rows) * step_y
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (tile, caption) in enumerate(row):
            left, top = GAP + x * step_x, GAP + y * step_y
            sheet.paste(Image.fromarray(np.ascontiguousarray(tile)), (left, top))
            for number, line in enumerate(caption.splitlines()):
                text = shorten(line, font, width)
                draw.text((left, top + height + number * LINE), text, fill="black", font=font)
    return np.asarray(sheet)


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return the end of a text, after "...", if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def pca_figure(
    images: UInt8[np.ndarray, "b h w c"], colors: Mapping[str, UInt8[np.ndarray, "b y x 3"]]
) -> UInt8[np.ndarray, "v u 3"]:
    """Draw images, and the colors of their patches in a column for each layer."""
    columns = [enlarge_grid(grid, images.shape[1:3]) for grid in colors.values()]
    return image_grid([images, *columns], ["image", *map(_column_label, colors)])


def _column_label(layer: str) -> str:
    return layer.replace("grid_", "layer ").replace("grid", "last layer") + ", 3 components"


def attention_figure(
    images: UInt8[np.ndarray, "b h w c"], attention: Float[np.ndarray, "b y x"]
) -> UInt8[np.ndarray, "v u 3"]:
    """Return images, their attention (white is the maximum), and images weighted by it."""
    mask = _enlarge(attention, images.shape[1:3])
    weighted = (images * (0.15 + 0.85 * mask)).astype(np.uint8)
    return image_grid(
        [images, (255 * mask).astype(np.uint8), weighted], ["image", "attention of cls", "both"]
    )


def head_figure(
    images: UInt8[np.ndarray, "b h w c"],
    attention: Mapping[int, Float[np.ndarray, "b heads y x"]],
    every_head: bool,
) -> UInt8[np.ndarray, "v u 3"]:
    """Draw images and their attention, by number of the block; white is the maximum of a map.

    A row is an image, with a column for each block; with `every_head` an image and a block, with a
    column for each head.
    """
    maps = {
        (block, head): weights[:, head] if every_head else weights.mean(axis=1)
        for block, weights in attention.items()
        for head in range(weights.shape[1] if every_head else 1)
    }
    enlarged = {key: _enlarge(weights, images.shape[1:3]) for key, weights in maps.items()}
    columns = {key: (255 * mask).astype(np.uint8) for key, mask in enlarged.items()}
    if not every_head:
        return image_grid([images, *columns.values()], ["image", *(f"block {b}" for b, _ in maps)])
    tile = lambda image: resize_tile(image)
    rows = [
        [
            (tile(image), f"block {block}"),
            *(
                (tile(c[number]), f"head {head + 1}")
                for (b, head), c in columns.items()
                if b == block
            ),
        ]
        for number, image in enumerate(images)
        for block in attention
    ]
    return tile_rows(rows)


def _enlarge(
    attention: Float[np.ndarray, "b y x"], image_size: tuple[int, int]
) -> Float[np.ndarray, "b h w 1"]:
    mask = attention / attention.max(axis=(1, 2), keepdims=True)
    return enlarge_grid(mask[..., None], image_size)
