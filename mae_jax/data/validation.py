"""Validate all images of a source, and compute channel statistics."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mae_jax.data.decode import decode, used_bits
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sources import DataError, Source, bad_image_error
from mae_jax.utils import console


@dataclass
class ValidationReport:
    """Summary of the images of a source.

    Attributes:
      bad: reason by name of a bad image.
      sizes: height and width of each good image.
      dtypes: number of good images by dtype.
      labels: number of good images by label.
      used_bits: bits that the values of pictures use and have, unless all are kept.
    """

    bad: dict[str, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    used_bits: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.bad) + len(self.sizes)


def validate_images(
    source: Source, channels: int, threads: int, bit_depth: int | None = None
) -> ValidationReport:
    """Decode every image of a source, with a progress bar; bit_depth as in `decode`."""

    def decode_record(index: int) -> tuple[np.ndarray, int, tuple[int, int] | None] | DataError:
        try:
            record = source[index]
            image = decode(record["image"], channels, bit_depth=bit_depth)
            usage = used_bits(record["image"], channels) if bit_depth is None else None
            return image, record["label"], usage
        except DataError as error:
            return error

    report = ValidationReport()
    results = ordered_parallel_map(decode_record, len(source), threads)
    for index, result in enumerate(console.progress(results, len(source))):
        if isinstance(result, DataError):
            report.bad[source.describe(index)] = str(result)
            continue
        image, label, usage = result
        report.sizes.append((image.shape[0], image.shape[1]))
        report.dtypes[image.dtype.name] += 1
        report.labels[label] += 1
        report.used_bits += [usage] if usage else []
    return report


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation per channel; uint8 images are divided by 255.

    With a bit depth, so are other integers by the end of their range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


def channel_stats(
    source: Source, channels: int, threads: int, bit_depth: int | None = None
) -> ChannelStats:
    """Compute mean and standard deviation over all pixels, with equal weight per image.

    Raises:
      DataError: an image is bad, or a channel is constant.
    """

    def moments(index: int) -> np.ndarray:
        try:
            image = decode(source[index]["image"], channels, bit_depth=bit_depth)
        except DataError as error:
            raise bad_image_error(source, index, error, "Repair or remove it") from error
        values = image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
        return np.stack([values.mean(axis=(0, 1)), np.square(values).mean(axis=(0, 1))])

    results = console.progress(ordered_parallel_map(moments, len(source), threads), len(source))
    mean, square = sum(results, np.zeros((2, channels))) / len(source)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    for channel in np.flatnonzero(std <= 1e-6 * np.abs(mean)):
        raise DataError(f"channel {channel} is constant ({mean[channel]:g}): remove it")
    return ChannelStats(tuple(mean.tolist()), tuple(std.tolist()))
