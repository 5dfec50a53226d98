"""Reconstruction figures, as in the paper's Figure 2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont

from mae_jax.distributed import sharding
from mae_jax.models.patches import enlarge_grid, patch_grid
from mae_jax.tasks.masking import Mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides

GRAY = 128  # masked patches
GAP = 6  # pixels between images
PATCH_STATS = {"gt": "true patch statistics", "visible": "statistics of visible neighbors"}
MIN_SIDE = 112  # pixels; smaller images are enlarged by an integer factor


def to_rgb_uint8(
    images: Shaped[np.ndarray, "b h w c"],
    channels: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> UInt8[np.ndarray, "b h w rgb"]:
    """Convert images of any number of channels and dtype to gray or RGB images of uint8.

    Of images that are neither gray nor RGB, `channels` are shown. For dtypes other than uint8,
    black is 2 standard deviations below the mean and white 2 above; NaN, without data, is black.
    """
    shown = list(range(images.shape[-1]) if images.shape[-1] in (1, 3) else channels)
    images = images[..., shown]
    if images.dtype == np.uint8:
        return images
    low, scale = np.array(mean)[shown] - 2 * np.array(std)[shown], 4 * np.array(std)[shown]
    values = np.where(np.isnan(images), -np.inf, (images - low) / scale)
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def check_display_channels(channels: Sequence[int], num_channels: int) -> tuple[int, ...]:
    """Return the channels to show of images with `num_channels`; of two, the first.

    Raises:
      UserError: they are not one or three existing channels.
    """
    if num_channels <= 3:
        return (0,)
    if len(channels) not in (1, 3) or not all(0 <= c < num_channels for c in channels):
        raise UserError(
            f"must be one or three numbers from 0 to {num_channels - 1}",
            key="eval.show_channels",
            value=tuple(channels),
        )
    return tuple(channels)


def reconstruction_panels(
    images: UInt8[np.ndarray, "b h w c"],
    reconstructions: UInt8[np.ndarray, "b h w c"],
    masked: Bool[np.ndarray, "b n"],
    patch: Sides,
) -> list[UInt8[np.ndarray, "b h w c"]]:
    """Return masked image, reconstruction, reconstruction with visible patches, and original."""
    image_size = images.shape[1:3]
    hidden = enlarge_grid(masked.reshape(-1, *patch_grid(image_size, patch), 1), image_size)
    visible = np.where(hidden, np.uint8(GRAY), images)
    pasted = np.where(hidden, reconstructions, images)
    return [visible, reconstructions, pasted, images]


def image_grid(
    columns: Sequence[UInt8[np.ndarray, "b h w c"]], labels: Sequence[str]
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw a grid with one column of images under each label; gray images become RGB."""
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
    """Draws reconstructions of the same images under the same masks for any parameters.

    stats: brightness of patches normalized by norm_pix, a key of PATCH_STATS. show: channels to
    show of images that are neither gray nor RGB.
    """

    task: Pretrain
    images: Shaped[np.ndarray, "b h w c"]
    mask: Mask
    stats: str
    show: tuple[int, ...] = (0, 1, 2)

    def run(self, params: Any) -> UInt8[np.ndarray, "y x 3"]:
        """Return the figure for some parameters."""
        return self.render(self.reconstruct(params))

    def reconstruct(self, params: Any) -> Shaped[np.ndarray, "b h w c"]:
        """Compute the reconstructions of the images."""
        mask = Mask(*jax.device_get(self.mask))  # the same on every process
        return _to_host(self._reconstruct(params, self.images, mask, stats=self.stats))

    def grid_features(self, params: Any) -> Float[np.ndarray, "b y x d"]:
        """Compute the encoder's features of all patches."""
        return _to_host(self._grid_features(params, self.images))

    def render(
        self,
        reconstructions: Shaped[np.ndarray, "b h w c"],
        colors: UInt8[np.ndarray, "b y x 3"] | None = None,
    ) -> UInt8[np.ndarray, "y x 3"]:
        """Draw the figure of reconstructions, with a column for the colors of patches."""
        originals, reconstructions = (
            to_rgb_uint8(np.asarray(images), self.show, self.task.mean, self.task.std)
            for images in (self.images, reconstructions)
        )
        columns = reconstruction_panels(
            originals, reconstructions, np.asarray(self.mask.as_bool()), self.task.patch
        )
        text = "reconstruction"
        if self.task.norm_pix:
            text += f" ({PATCH_STATS[self.stats]})"
        labels = [f"masked, {self.task.num_masked} of {self.task.num_patches} patches hidden", text]
        labels += ["with the visible patches", "original"]
        if colors is not None:
            columns.append(enlarge_grid(colors, originals.shape[1:3]))
            labels.append("features: 3 principal components")
        return image_grid(columns, labels)

    @cached_property  # compiled once per run
    def _reconstruct(self) -> Callable[..., Array]:
        return jax.jit(self.task.reconstruct, static_argnames="stats")

    @cached_property
    def _grid_features(self) -> Callable[..., Array]:
        return jax.jit(self.task.grid_features)


def _to_host(images: Array) -> np.ndarray:
    return np.asarray(images if images.is_fully_addressable else sharding.gather_to_host(images))


def save_png(path: Path, image: UInt8[np.ndarray, "y x 3"]) -> None:
    """Write an image atomically, and create its parent folders."""
    with atomic_path(path) as part:
        Image.fromarray(image).save(part, "PNG")
