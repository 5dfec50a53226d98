"""Pixels without data, counted: NoData of GDAL or DICOM, and NaN or Inf."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mae_jax.data.decode import MaskedImage
from mae_jax.utils.cli import pluralize


@dataclass
class NoDataCounts:
    """Counts over images: how many have missing samples, and what share of their pixels.

    values: number of images by NoData value.
    """

    images: int = 0
    pixels: int = 0
    incomplete_pixels: int = 0
    missing: np.ndarray = field(default_factory=lambda: np.zeros(1))  # samples, per channel
    values: Counter[str] = field(default_factory=Counter)

    def add(self, image: MaskedImage) -> None:
        """Count an image."""
        if image.value is not None:
            self.values[f"{image.value:g}"] += 1  # text, since NaN differs from itself
        if image.missing.any():
            self.images += 1
            self.incomplete_pixels += int(image.missing.any(axis=-1).sum())
            self.missing = self.missing + image.missing.sum(axis=(0, 1))
        self.pixels += image.missing.shape[0] * image.missing.shape[1]

    def __str__(self) -> str:
        """Return NoData values and the share of pixels; "" without any."""
        tags = ", ".join(
            f"{value} ({pluralize(count, 'file')})" for value, count in self.values.items()
        )
        text = f"NoData {tags}; " if tags else ""
        if not self.images:
            return f"{text}no pixel has it" if tags else ""
        text += (
            f"{_percent(self.incomplete_pixels / self.pixels)} of all pixels are NoData, NaN or "
            f"Inf, in {pluralize(self.images, 'image')}"
        )
        shares = self.missing / self.pixels
        if np.ptp(shares) == 0:
            return text
        return f"{text}; by channel {', '.join(_percent(share) for share in shares)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
