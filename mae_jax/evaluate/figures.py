"""The paper's figure 2: what the model sees, what it makes of it, and what was there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax.distributed import sharding
from mae_jax.tasks.masking import Mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.atomic import atomic_path

GRAY = 128  # of a masked patch
GAP = 6  # pixels between pictures
PATCH_STATS = {"gt": "true patch statistics", "visible": "statistics of visible neighbours"}
MIN_SIDE = 112  # pixels; smaller images are enlarged by a whole factor


def to_rgb_uint8(
    images: Shaped[np.ndarray, "b h w c"],
    channels: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> UInt8[np.ndarray, "b h w rgb"]:
    """Images of any channels and type as a person can look at them.

    Grey and RGB images stay as they are, of others some channels are taken. Where values are not
    of 0..255, black is 2 deviations below the mean, and white 2 above.
    """
    chosen = list(range(images.shape[-1]) if images.shape[-1] in (1, 3) else channels)
    images = images[..., chosen]
    if images.dtype == np.uint8:
        return images
    low, width = np.array(mean)[chosen] - 2 * np.array(std)[chosen], 4 * np.array(std)[chosen]
    return (255 * ((images - low) / width).clip(0, 1)).round().astype(np.uint8)


def check_display_channels(channels: Sequence[int], count: int) -> tuple[int, ...]:
    """The channels to show of images of so many; of two, one is shown.

    Raises:
      ValueError: they are not one or three that exist.
    """
    if count <= 3:
        return (0,)
    if len(channels) not in (1, 3) or not all(0 <= channel < count for channel in channels):
        raise ValueError(
            f"eval.show_channels={tuple(channels)}: use one or three numbers from 0 to {count - 1}"
        )
    return tuple(channels)


def reconstruction_panels(
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
    seen = np.where(hidden, np.uint8(GRAY), images)
    pasted = np.where(hidden, reconstructions, images)
    return [seen, reconstructions, pasted, images]


def image_grid(
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
class ReconstructionFigure:
    """Draws the same images under the same masks, whatever the parameters."""

    task: Pretrain
    images: Shaped[np.ndarray, "b h w c"]
    mask: Mask
    stats: str
    show: tuple[int, ...] = (0, 1, 2)  # channels, of images that are neither grey nor RGB

    def run(self, params: Any) -> UInt8[np.ndarray, "y x 3"]:
        """The figure for some parameters."""
        return self.render(self.reconstruct(params))

    def reconstruct(self, params: Any) -> Shaped[np.ndarray, "b h w c"]:
        """What a model with some parameters makes of the images."""
        mask = Mask(*jax.device_get(self.mask))  # the same on every process
        made = self._reconstruct(params, self.images, mask, stats=self.stats)
        return np.asarray(made if made.is_fully_addressable else sharding.gather_to_host(made))

    def render(self, made: Shaped[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "y x 3"]:
        """The figure of what a model made."""
        originals, made = (
            to_rgb_uint8(np.asarray(images), self.show, self.task.mean, self.task.std)
            for images in (self.images, made)
        )
        columns = reconstruction_panels(
            originals, made, np.asarray(self.mask.as_bool()), self.task.patch
        )
        text = "reconstruction"
        if self.task.norm_pix:
            text += f" ({PATCH_STATS[self.stats]})"
        labels = [f"masked, {self.task.num_masked} of {self.task.num_patches} patches hidden", text]
        return image_grid(columns, [*labels, "with the visible patches", "original"])

    @cached_property  # compiled once in a run
    def _reconstruct(self) -> Callable[..., Array]:
        return jax.jit(self.task.reconstruct, static_argnames="stats")


def save_png(path: Path, picture: UInt8[np.ndarray, "y x 3"]) -> None:
    """Writes a picture, and the folders above it."""
    with atomic_path(path) as part:
        Image.fromarray(picture).save(part, "PNG")
