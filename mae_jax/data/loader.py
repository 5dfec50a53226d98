"""Deterministic batches of images, prefetched by threads or worker processes.

Order, crops and flips depend on the seed and the position in the global order only: not on hosts,
workers, threads or interruptions. The state of the pipeline is therefore the step, and nothing else
is checkpointed.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grain
import numpy as np

from mae_jax.data.collate import Batch, Shapes, collate
from mae_jax.data.sources import DataError, Record, Source, bad_image_error
from mae_jax.data.transforms import Example
from mae_jax.data.worker_processes import read_options, to_worker_processes, worker_errors

Transform = Callable[..., Example]  # of an encoded image, a generator and, if there is one, "mask"
T = TypeVar("T")
SKIP_HINT = "Repair or remove it, or set data.on_bad=skip"
log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class ExampleLoader:
    """Reads and transforms a record; with `skip`, the next good one in place of a bad one.

    Args:
      hint: remedy, appended to the error about a bad record.
      num_classes: labels must be below it, if given.
      max_bad: with `skip`, maximum number of consecutive bad records.
    """

    source: Source
    transform: Transform
    skip: bool = False
    hint: str = SKIP_HINT
    num_classes: int | None = None
    max_bad: int = 100

    def __call__(self, index: int, rng: Any = None) -> dict[str, Any]:
        """Return the transformed record with "label", "index" and "skipped".

        "index" is the argument, and "skipped" the number of bad records from there on.

        Raises:
          DataError: a record is bad and not skipped, or a label is out of range.
        """
        attempts = min(len(self.source), self.max_bad + 1)
        for skipped in range(attempts):
            candidate = (index + skipped) % len(self.source)
            try:
                record, example = self.read(candidate, rng)
            except DataError as error:
                if not self.skip:
                    raise bad_image_error(self.source, candidate, error, self.hint) from error
                continue
            self._check_label(candidate, record["label"])
            return {
                **example,
                "label": np.int32(record["label"]),
                "index": np.int64(index),
                "skipped": np.int32(skipped),
            }
        raise DataError(
            f"does not suffice: {attempts} consecutive images are bad, from "
            f"{self.source.describe(index)} on",
            key="data.max_bad",
            value=self.max_bad,
        )

    def read(self, index: int, rng: Any) -> tuple[Record, Example]:
        """Return a record, and its transformed image (and mask)."""
        record = self.source[index]
        mask = {"mask": record["mask"]} if "mask" in record else {}
        return record, self.transform(record["image"], rng, **mask)

    def _check_label(self, index: int, label: int) -> None:
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.source.describe(index)} has label {label}, which is not within 0 to "
                f"{self.num_classes - 1}: fix the label, or use another split"
            )


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Endless shuffled training batches.

    Args:
      batch_size: global, over all hosts; each host yields batch_size // hosts rows of it.
      shapes: as in `collate`.
      workers: processes that decode, with `threads` threads each; 0 decodes in this process.
      max_bad: with `skip`, maximum number of distinct bad records.
      num_classes: labels must be below it, if given.

    Raises:
      DataError: the batch is larger than the dataset.
    """

    source: Source
    transform: Transform
    seed: int
    batch_size: int
    shapes: Shapes = field(default_factory=dict)
    workers: int = 0
    threads: int = 2
    skip: bool = False
    max_bad: int = 100
    num_classes: int | None = None
    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if len(self.source) < self.batch_size:
            raise DataError(
                f"is larger than the dataset of {len(self.source)} images",
                key="batch_size",
                value=self.batch_size,
            )

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield the batches from a step on: the transform's arrays, "label" [b] and "index" [b].

        Raises:
          DataError: a record is bad and not skipped, or more than `max_bad` are skipped.
          WorkerError: a worker process was killed.
        """
        load = ExampleLoader(
            self.source,
            self.transform,
            self.skip,
            num_classes=self.num_classes,
            max_bad=self.max_bad,
        )
        examples = _shuffled_indices(len(self.source), self.seed).random_map(load)
        rows = _host_rows(examples, self.batch_size, start_step, self.host, self.hosts)
        if self.workers:
            dataset = to_worker_processes(rows, self.workers, self.threads)
        else:
            dataset = rows.to_iter_dataset(read_options(self.threads))
        iterator = iter(dataset)
        bad: set[int] = set()
        try:
            with worker_errors():
                size = self.batch_size // self.hosts
                for batch in collate(iterator, size, self.source, self.shapes):
                    _log_skipped(load, batch.pop("skipped"), batch["index"], bad)
                    yield batch
        finally:
            iterator.close()

    def record_indices(self, step: int) -> list[int]:
        """Return the record indices of a step's global batch."""
        return _record_indices(len(self.source), self.seed, self.batch_size, step)


@dataclass(frozen=True, kw_only=True)
class ArrayLoader:
    """Endless batches of rows of arrays in memory, in the order of `Loader`'s records."""

    arrays: Mapping[str, np.ndarray]
    seed: int
    batch_size: int
    host: int = 0
    hosts: int = 1

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Yield the batches from a step on: rows of each array."""
        indices = _shuffled_indices(self._num_rows(), self.seed)
        rows = _host_rows(indices, self.batch_size, start_step, self.host, self.hosts)
        for batch in rows.batch(self.batch_size // self.hosts):
            yield {name: array[batch] for name, array in self.arrays.items()}

    def record_indices(self, step: int) -> list[int]:
        """Return the row indices of a step's global batch."""
        return _record_indices(self._num_rows(), self.seed, self.batch_size, step)

    def _num_rows(self) -> int:
        return len(next(iter(self.arrays.values())))


def _shuffled_indices(count: int, seed: int) -> grain.MapDataset:
    """Return record indices, reshuffled every epoch."""
    # An endless repeat overflows.
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(10**9)


def _record_indices(count: int, seed: int, batch_size: int, step: int) -> list[int]:
    indices: Any = _shuffled_indices(count, seed)
    return [int(indices[step * batch_size + row]) for row in range(batch_size)]


def _host_rows(
    dataset: grain.MapDataset, batch_size: int, start_step: int, host: int, hosts: int
) -> grain.MapDataset:
    """Return this host's rows of all batches from a step on.

    A batch is a slice of the global order, and a host's rows are a slice of the batch, so the
    global batch does not depend on the number of hosts.
    """
    to_global = partial(_global_index, batch_size=batch_size, host=host, hosts=hosts)
    begin = start_step * (batch_size // hosts)
    rows = grain.MapDataset.range(begin, len(dataset) // hosts)
    return rows.map(lambda row: dataset[to_global(row)])


def _global_index(row: int, batch_size: int, host: int, hosts: int) -> int:
    """Return the position in the global order of a host's `row`-th row."""
    per_host = batch_size // hosts
    step, offset = divmod(row, per_host)
    return step * batch_size + host * per_host + offset


def _log_skipped(
    load: ExampleLoader, skipped: np.ndarray, index: np.ndarray, bad: set[int]
) -> None:
    for row in np.flatnonzero(skipped):
        for offset in range(skipped[row]):
            _record_bad(load, int(index[row] + offset) % len(load.source), bad)


def _record_bad(load: ExampleLoader, index: int, bad: set[int]) -> None:
    """Log a bad record once; raise DataError if there are more than `max_bad`."""
    if index in bad:
        return
    bad.add(index)
    name = load.source.describe(index)
    try:
        load.read(index, np.random.default_rng(0))
    except DataError as error:
        log.warning("skipped a bad image (%d so far): %s: %s", len(bad), name, error)
    if len(bad) > load.max_bad:
        raise DataError(
            f"does not suffice: {len(bad)} images are bad, the last one is {name}",
            key="data.max_bad",
            value=load.max_bad,
        )


def eval_batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    threads: int = 2,
    skip: bool = False,
    hint: str = SKIP_HINT,
    max_bad: int = 100,
    num_classes: int | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Yield every record once, in order; "valid" is False for the padding of the last batch.

    With `skip`, a bad record is logged, replaced by the next good one and marked not valid, for up
    to `max_bad` of them. As in `Loader`, the batch size is global and a host yields its rows.

    Args:
      hint: remedy, appended to the error about a bad record.

    Raises:
      DataError: a record is bad and not skipped, or more than `max_bad` are skipped.
    """
    bad: set[int] = set()
    load = ExampleLoader(source, transform, skip, hint, num_classes, max_bad)
    last, per_host = len(source) - 1, batch_size // hosts
    count = -(-len(source) // batch_size) * per_host
    to_global = partial(_global_index, batch_size=batch_size, host=host, hosts=hosts)
    examples = ordered_parallel_map(lambda row: load(min(to_global(row), last)), count, threads)
    for number, batch in enumerate(collate(examples, per_host, source, {})):
        index = to_global(number * per_host) + np.arange(per_host)
        valid = (index <= last) & (batch.pop("skipped") == 0)
        for bad_index in index[(index <= last) & ~valid]:
            _record_bad(load, int(bad_index), bad)
        yield batch | {"valid": valid}


def ordered_parallel_map(function: Callable[[int], T], count: int, threads: int) -> Iterator[T]:
    """Yield function(0), function(1), ... function(count - 1), computed by threads."""
    # In tuples, since grain skips None.
    boxed = grain.MapDataset.range(count).map(lambda index: (function(index),))
    for (result,) in boxed.to_iter_dataset(read_options(threads)):
        yield result
