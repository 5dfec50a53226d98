"""Parts of a source: evenly spaced records, or a few of every class."""

import hashlib
from collections.abc import Callable, Sequence

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

    def label(self, index: int) -> int:
        return self._source.label(int(self._numbers[index]))

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._numbers[index]))

    def fingerprint(self) -> str:
        numbers = hashlib.sha256(self._numbers.tobytes()).hexdigest()
        return f"{self._source.fingerprint()} {numbers[:16]}"


def evenly_spaced(source: Source, count: int) -> Subset:
    """At most `count` records."""
    numbers = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    return Subset(source, numbers)


def few_shot(source: Source, shots: int, seed: int) -> Subset:
    """`shots` records of every class; see `draw_shots`."""
    return Subset(source, sample_shots(source.label, len(source), source.classes, shots, seed))


def sample_shots(
    label: Callable[[int], int], count: int, classes: Sequence[str], shots: int, seed: int
) -> list[int]:
    """Numbers of `shots` records of every class, the first of a random order of all `count`.

    Records of no class, as in splits whose labels are secret, are passed over.

    Raises:
      DataError: there are not as many of some class.
    """
    chosen: list[list[int]] = [[] for _ in classes]
    lacking = len(chosen)
    for number in map(int, np.random.default_rng(seed).permutation(count)):
        if not lacking:
            break
        of = label(number)
        if 0 <= of < len(chosen) and len(chosen[of]) < shots:
            chosen[of].append(number)
            lacking -= len(chosen[of]) == shots
    if lacking:
        fewest, name = min((len(found), name) for found, name in zip(chosen, classes))
        raise DataError(f"{shots} shots, but class {name!r} has only {fewest} images")
    return sorted(number for found in chosen for number in found)
