"""The paper's figure 2: what the model sees, what it makes of it, and what was there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax.tasks.masking import Mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.whole import whole

GREY = 128  # of a masked patch
GAP = 6  # pixels between pictures
STATISTICS = {"gt": "true patch statistics", "visible": "statistics of visible neighbours"}
MIN_SIDE = 112  # pixels; smaller images are enlarged by a whole factor


def panels(
    images: UInt8[np.ndarray, "b h w c"],
    reconstructions: UInt8[np.ndarray, "b h w c"],
    masked: Bool[np.ndarray, "b n"],
    patch: int,
) -> list[UInt8[np.ndarray, "b h w c"]]:
    """Masked input, reconstruction, reconstruction with visible patches pasted, original."""
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    hidden = (
        masked.reshape(-1, rows, columns).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    )
    seen = np.where(hidden, np.uint8(GREY), images)
    pasted = np.where(hidden, reconstructions, images)
    return [seen, reconstructions, pasted, images]


def figure(
    columns: Sequence[UInt8[np.ndarray, "b h w c"]], labels: Sequence[str]
) -> UInt8[np.ndarray, "y x 3"]:
    """A grid of pictures, one column of images under each label; grey images become RGB."""
    count, height, width, _ = columns[0].shape
    scale = max(1, -(-MIN_SIDE // min(height, width)))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(14)
    lines = [_wrap(label, font, width) for label in labels]
    top = GAP + max(len(text) for text in lines) * 18
    sheet = Image.new(
        "RGB",
        (GAP + len(columns) * (width + GAP), top + GAP + count * (height + GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for x, (column, text) in enumerate(zip(columns, lines)):
        left = GAP + x * (width + GAP)
        draw.multiline_text((left, GAP), "\n".join(text), fill="black", font=font)
        for y, image in enumerate(column):
            shown = image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)
            tile = Image.fromarray(np.ascontiguousarray(shown))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (left, top + GAP + y * (height + GAP)))
    return np.asarray(sheet)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@dataclass(frozen=True)
class Pictures:
    """Draws the same images under the same masks, whatever the parameters."""

    task: Pretrain
    images: UInt8[np.ndarray, "b h w c"]
    mask: Mask
    stats: str

    def run(self, params: Any) -> UInt8[np.ndarray, "y x 3"]:
        """The figure for some parameters."""
        pictures = self._reconstruct(params, self.images, self.mask, stats=self.stats)
        columns = panels(
            self.images, np.asarray(pictures), np.asarray(self.mask.as_bool()), self.task.patch
        )
        hidden = self.task.num_patches - self.task.num_kept
        made = "reconstruction"
        if self.task.norm_pix:
            made += f" ({STATISTICS[self.stats]})"
        labels = [f"masked, {hidden} of {self.task.num_patches} patches hidden", made]
        return figure(columns, [*labels, "with the visible patches", "original"])

    @cached_property  # compiled once in a run
    def _reconstruct(self) -> Callable[..., Array]:
        return jax.jit(self.task.reconstruct, static_argnames="stats")


def save_png(path: Path, picture: UInt8[np.ndarray, "y x 3"]) -> None:
    """Writes a picture, and the folders above it."""
    with whole(path) as part:
        Image.fromarray(picture).save(part, "PNG")
