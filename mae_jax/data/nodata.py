"""Pixels without data: GDAL's NoData value of a TIFF, and NaN or Inf."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from mae_jax.data.decode import Encoded, decode, decode_numpy
from mae_jax.data.file_kinds import NUMPY, TIFF
from mae_jax.data.tiff import apply_orientation, nodata_value, read_tiff, stored_values
from mae_jax.utils.cli import pluralize


class MaskedImage(NamedTuple):
    """An image as `decode` returns it, and where its samples have no data.

    The pixels are 0 where they are NaN or Inf. value: NoData of the file, None without the tag.
    """

    pixels: Shaped[np.ndarray, "h w c"]
    missing: Bool[np.ndarray, "h w c"]
    value: float | None


def decode_masked(encoded: Encoded, channels: int, bit_depth: int | None = None) -> MaskedImage:
    """Decode an image of which samples may be missing; bit_depth as in `decode`.

    Raises:
      DataError: as in `decode`, but not for NaN and Inf.
    """
    try:
        value = None if isinstance(encoded, np.ndarray) else nodata_value(encoded)
        samples = _samples(encoded, channels, value)
    except Exception:  # of a corrupt file, about which `decode` raises
        value = samples = None
    if samples is None:
        pixels = decode(encoded, channels, bit_depth=bit_depth)
        return MaskedImage(pixels, np.zeros(pixels.shape, bool), None)
    missing = ~np.isfinite(samples)
    replaced = np.where(missing, 0, samples) if missing.any() else encoded
    if value is not None:
        missing |= _equal(samples, value)
    pixels = decode(replaced, channels, bit_depth=bit_depth)
    if missing.ndim == 2:
        missing = missing[..., None]
    if missing.shape[:2] != pixels.shape[:2]:  # channels first
        missing = np.moveaxis(missing, 0, -1)
    if missing.shape[-1] not in (1, pixels.shape[-1]):  # colors that became gray
        missing = missing.any(axis=-1, keepdims=True)
    return MaskedImage(pixels, np.broadcast_to(missing, pixels.shape), value)


def _samples(encoded: Encoded, channels: int, value: float | None) -> np.ndarray | None:
    """Return the samples that may be missing, before any conversion; None if none may be."""
    if isinstance(encoded, np.ndarray):
        return encoded if encoded.dtype.kind == "f" else None
    if encoded.startswith(NUMPY):
        array = decode_numpy(encoded)
        return array if array.dtype.kind == "f" else None
    if not encoded.startswith(TIFF):
        return None
    if value is not None and (stored := stored_values(encoded)) is not None:
        return stored
    array, _, orientation = read_tiff(encoded, channels)
    array = apply_orientation(array, orientation)
    return array if value is not None or array.dtype.kind == "f" else None


def _equal(samples: np.ndarray, value: float) -> np.ndarray:
    """Return where samples are a value, as rounded to their dtype; nowhere if it cannot be."""
    if samples.dtype.kind == "f":
        return samples == samples.dtype.type(value)
    return samples == value


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
        text = f"GDAL's NoData {tags}; " if tags else ""
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
