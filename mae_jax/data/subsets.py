"""Subsets of a source: evenly spaced records, or a few of every class."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from mae_jax.data.sources import DataError, Record, Source


class Subset:
    """The records of a source at some indices."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self._source = source
        self._indices = np.asarray(indices, int)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def label(self, index: int) -> int:
        return self._source.label(int(self._indices[index]))

    def describe(self, index: int) -> str:
        return self._source.describe(int(self._indices[index]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._indices.tobytes()).hexdigest()
        return f"{self._source.fingerprint()} {digest[:16]}"


def evenly_spaced(source: Source, count: int) -> Subset:
    """Return `count` evenly spaced records, or all if there are fewer."""
    return Subset(source, evenly_spaced_indices(len(source), count))


def evenly_spaced_indices(size: int, count: int) -> np.ndarray:
    """Return `count` evenly spaced indices from 0 to size - 1, or all if there are fewer."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int)


def few_shot(source: Source, shots: int, seed: int) -> Subset:
    """Return `shots` random records of every class; see `sample_shots`."""
    return Subset(source, sample_shots(source.label, len(source), source.classes, shots, seed))


def sample_shots(
    label: Callable[[int], int], count: int, classes: Sequence[str], shots: int, seed: int
) -> list[int]:
    """Return the sorted indices of `shots` records of every class.

    They are the first of each class in a random order of all records. Records with other labels,
    as in splits with hidden labels, are ignored.

    Args:
      label: returns the class index of a record.
      count: number of records.

    Raises:
      DataError: a class has fewer records.
    """
    chosen: list[list[int]] = [[] for _ in classes]
    incomplete = len(chosen)
    for index in map(int, np.random.default_rng(seed).permutation(count)):
        if not incomplete:
            break
        class_index = label(index)
        if 0 <= class_index < len(chosen) and len(chosen[class_index]) < shots:
            chosen[class_index].append(index)
            incomplete -= len(chosen[class_index]) == shots
    if incomplete:
        fewest, name = min((len(indices), name) for indices, name in zip(chosen, classes))
        raise DataError(
            f"is more than the {fewest} images of class {name!r}", key="data.shots", value=shots
        )
    return sorted(index for indices in chosen for index in indices)
