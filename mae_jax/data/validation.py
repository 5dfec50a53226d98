"""What a data set is like: which images are bad, how large they are, their mean and deviation."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mae_jax.data.decode import decode
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sources import DataError, Source, bad_image_error
from mae_jax.utils import console


@dataclass
class ValidationReport:
    """Bad images with the reason; of good ones height and width, types, how many of each class."""

    bad: dict[str, str] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.bad) + len(self.sizes)


def validate_images(source: Source, channels: int, threads: int) -> ValidationReport:
    """Decodes every image of a source, with a progress bar."""

    def look(number: int) -> tuple[np.ndarray, int] | DataError:
        try:
            record = source[number]
            return decode(record["image"], channels), record["label"]
        except DataError as error:
            return error

    report = ValidationReport()
    found = console.progress(ordered_parallel_map(look, len(source), threads), len(source))
    for number, seen in enumerate(found):
        if isinstance(seen, DataError):
            report.bad[source.describe(number)] = str(seen)
            continue
        image, label = seen
        report.sizes.append((image.shape[0], image.shape[1]))
        report.types[image.dtype.name] += 1
        report.classes[label] += 1
    return report


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation of each channel, of values as `mae_jax.models.image_ops` takes them."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def channel_stats(source: Source, channels: int, threads: int) -> ChannelStats:
    """Over all pixels, each image counting the same; with a progress bar.

    Raises:
      DataError: an image is bad, or a channel is the same everywhere.
    """

    def moments(number: int) -> np.ndarray:
        try:
            image = decode(source[number]["image"], channels)
        except DataError as error:
            raise bad_image_error(source, number, error, "Mend or remove it") from error
        values = image.astype(np.float64) / (255 if image.dtype == np.uint8 else 1)
        return np.stack([values.mean(axis=(0, 1)), np.square(values).mean(axis=(0, 1))])

    found = ordered_parallel_map(moments, len(source), threads)
    mean, square = sum(console.progress(found, len(source)), np.zeros((2, channels))) / len(source)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    for channel in np.flatnonzero(deviation <= 1e-6 * np.abs(mean)):
        raise DataError(f"channel {channel} is {mean[channel]:g} everywhere: leave it out")
    return ChannelStats(tuple(mean.tolist()), tuple(deviation.tolist()))
