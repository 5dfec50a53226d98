"""Gray levels of pictures of 16 bits that are lost when they are read with 8 bits."""

import functools
import logging
from collections.abc import Iterable

from mae_jax.data.decode import used_bits
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import evenly_spaced

SAMPLED = 16  # images that are tried for a warning
KEEP = "data.bit_depth={} keeps all levels"
log = logging.getLogger("mae_jax")


def describe_loss(usages: Iterable[tuple[int, int]], remedy: str = KEEP) -> str:
    """Return what is lost of pictures, given the bits that their values use and have.

    Args:
      remedy: with {} for the number of bits that holds all values.
    """
    used, bits = max(usages)
    levels = 2**used
    left = (levels - 1) * 255 // (2**bits - 1) + 1
    where = f"{used} of {bits} bits" if used < bits else f"all {bits} bits"
    return (
        f"values use {where}, but are read with 8 bits: {left} of {levels:,} gray levels are "
        f"left. {remedy.format(max(used, 1))}"
    )


def warn_of_loss(source: Source, channels: int, remedy: str = KEEP) -> None:
    """Log once per dataset if pictures lose gray levels; tries some evenly spaced images."""
    usages: dict[str, tuple[int, int]] = {}
    some = evenly_spaced(source, min(SAMPLED, len(source)))
    for index in range(len(some)):
        try:
            usage = used_bits(some[index]["image"], channels)
        except DataError:
            continue  # reported when the image is read
        if usage:
            usages[some.describe(index)] = usage
    if usages:
        _log_once(f"{next(iter(usages))}: {describe_loss(usages.values(), remedy)}")


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)
