"""Validate all images of a source, and compute channel statistics."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mae_jax.data.decode import MaskedImage, decode, decode_masked, used_bits
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.nodata import NoDataCounts
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sources import DataError, Source, bad_image_error
from mae_jax.utils import console

NAN_HINT = "Repair or remove it, or leave out NaN and Inf with --nodata nan or --ignore-nodata"
Decoded = tuple[np.ndarray, int, tuple[int, int] | None]  # image, label, used bits


@dataclass
class ValidationReport:
    """Summary of the images of a source.

    Attributes:
      bad: reason by name of a bad image.
      sizes: height and width of each good image.
      dtypes: number of good images by dtype.
      labels: number of good images by label.
      used_bits: bits that the values of pictures use and have, unless all are kept.
      uint16_bits: bits that the values of uint16 images use; 0 without any.
      nodata: of all images that can be decoded but for NaN and Inf, which are bad.
    """

    bad: dict[str, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    used_bits: list[tuple[int, int]] = field(default_factory=list)
    uint16_bits: int = 0
    nodata: NoDataCounts = field(default_factory=NoDataCounts)

    def __len__(self) -> int:
        return len(self.bad) + len(self.sizes)


def validate_images(
    source: Source,
    channels: int,
    threads: int,
    bit_depth: int | None = None,
    options: ReadOptions = ReadOptions(),
) -> ValidationReport:
    """Decode every image of a source, with a progress bar; bit_depth, options as in `decode`."""
    arguments: dict[str, Any] = {"bit_depth": bit_depth, "options": options}
    cuts_bits = bit_depth is None and options.bands is None

    def decode_record(index: int) -> tuple[MaskedImage | None, Decoded | DataError]:
        masked = None
        try:
            record = source[index]
            masked = decode_masked(record["image"], channels, **arguments)
            image = masked.pixels
            if masked.missing.any() and options.nodata is None:  # raises for NaN and Inf
                image = decode(record["image"], channels, **arguments)
            usage = used_bits(record["image"], channels) if cuts_bits else None
            return masked, (image, record["label"], usage)
        except DataError as error:
            return masked, error

    report = ValidationReport()
    results = ordered_parallel_map(decode_record, len(source), threads)
    for index, (masked, result) in enumerate(console.progress(results, len(source))):
        if masked:
            report.nodata.add(masked)
        if isinstance(result, DataError):
            report.bad[source.describe(index)] = str(result)
            continue
        image, label, usage = result
        report.sizes.append((image.shape[0], image.shape[1]))
        report.dtypes[image.dtype.name] += 1
        report.labels[label] += 1
        report.used_bits += [usage] if usage else []
        if image.dtype == np.uint16:
            report.uint16_bits = max(report.uint16_bits, int(image.max()).bit_length())
    return report


class ChannelStats(NamedTuple):
    """Mean and standard deviation per channel; uint8 images are divided by 255.

    With a bit depth, so are other integers by the end of their range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: NoDataCounts


def channel_stats(
    source: Source,
    channels: int,
    threads: int,
    bit_depth: int | None = None,
    options: ReadOptions = ReadOptions(),
    *,
    ignore_nodata: bool = False,
) -> ChannelStats:
    """Compute mean and standard deviation over all pixels, with equal weight per image.

    Args:
      options: as in `decode`; `nodata` implies ignore_nodata.
      ignore_nodata: leave out samples that are NoData, NaN or Inf; an image without any other
        sample in a channel does not count there.

    Raises:
      DataError: an image is bad or of another dtype than the first, or a channel is constant or
        has no data.
    """

    arguments: dict[str, Any] = {"bit_depth": bit_depth, "options": options}
    ignore_nodata = ignore_nodata or options.nodata is not None

    def read(index: int) -> tuple[np.ndarray, MaskedImage]:
        try:
            encoded = source[index]["image"]
            image = decode_masked(encoded, channels, **arguments)
            if image.missing.any() and not ignore_nodata:  # raises for NaN and Inf
                decode(encoded, channels, **arguments)
        except DataError as error:
            hint = NAN_HINT if "NaN" in str(error) else "Repair or remove it"
            raise bad_image_error(source, index, error, hint) from error
        return _moments(image, ignore_nodata), image

    nodata, sums, dtype = NoDataCounts(), np.zeros((3, channels)), None
    results = console.progress(ordered_parallel_map(read, len(source), threads), len(source))
    for index, (moments, image) in enumerate(results):
        dtype = dtype or image.pixels.dtype
        if image.pixels.dtype != dtype:
            raise DataError(
                f"{source.describe(index)} is {image.pixels.dtype}, but {source.describe(0)} is "
                f"{dtype}: all images must have the same dtype"
            )
        sums += moments
        nodata.add(image)
    mean, square, count = sums
    for channel in np.flatnonzero(count == 0):
        raise DataError(f"channel {channel} has no data in any image: remove it")
    mean, square = mean / count, square / count
    std = np.sqrt(np.maximum(square - mean**2, 0))
    for channel in np.flatnonzero(std <= 1e-6 * np.abs(mean)):
        raise DataError(f"channel {channel} is constant ({mean[channel]:g}): remove it")
    return ChannelStats(tuple(mean.tolist()), tuple(std.tolist()), nodata)


def _moments(image: MaskedImage, ignore_nodata: bool) -> np.ndarray:
    """Return mean and mean square per channel, and 1 where they count, else 0."""
    values = image.pixels.astype(np.float64) / (255 if image.pixels.dtype == np.uint8 else 1)
    if not (ignore_nodata and image.missing.any()):
        first, second = values.mean(axis=(0, 1)), np.square(values).mean(axis=(0, 1))
        return np.stack([first, second, np.ones_like(first)])
    values[image.missing] = 0
    count = (~image.missing).sum(axis=(0, 1))
    sums = np.stack([values.sum(axis=(0, 1)), np.square(values).sum(axis=(0, 1)), count > 0])
    return sums / np.stack([np.maximum(count, 1), np.maximum(count, 1), np.ones_like(count)])
