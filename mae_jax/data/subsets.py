"""Parts of a source: evenly spaced records, or a few of every class."""

import hashlib
from collections.abc import Sequence

import numpy as np

from mae_jax.data.sources import DataError, Record, Source


class Subset:
    """Some records of a source, by their numbers."""

    def __init__(self, source: Source, numbers: Sequence[int] | np.ndarray):
        self._source = source
        self._numbers = np.asarray(numbers, int)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._numbers[index])]

    def key(self, index: int) -> str:
        return self._source.key(int(self._numbers[index]))

    def fingerprint(self) -> str:
        numbers = hashlib.sha256(self._numbers.tobytes()).hexdigest()
        return f"{self._source.fingerprint()} {numbers[:16]}"


def evenly_spaced(source: Source, count: int) -> Subset:
    """At most `count` records."""
    numbers = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    return Subset(source, numbers)


def few_shot(source: Source, shots: int, seed: int) -> Subset:
    """`shots` records of every class, the first of a random order that the seed decides.

    Raises:
      DataError: there are not as many of some class.
    """
    chosen: dict[int, list[int]] = {label: [] for label in range(len(source.classes))}
    lacking = len(chosen)
    for number in np.random.default_rng(seed).permutation(len(source)):
        if not lacking:
            break
        of_class = chosen.get(source[int(number)]["label"])
        if of_class is not None and len(of_class) < shots:
            of_class.append(int(number))
            lacking -= len(of_class) == shots
    if lacking:
        scarce = {source.classes[c]: len(found) for c, found in chosen.items()}
        name, count = min(scarce.items(), key=lambda item: item[1])
        raise DataError(f"data.shots={shots}, but class {name!r} has only {count} images")
    return Subset(source, sorted(number for found in chosen.values() for number in found))
