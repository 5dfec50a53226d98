"""Batches of images as one function of (seed, step), read ahead by threads or processes.

The order of the data, every crop and every flip depend on the seed and on the position in the
global order alone: not on hosts, workers or threads, nor on whether the run was interrupted.
The state of the pipeline is therefore the step, and nothing else has to be saved.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import grain
import numpy as np

from mae_jax.data.batches import Batch, Shapes, collate
from mae_jax.data.decode import Encoded
from mae_jax.data.sources import DataError, Record, Source, bad_image_error
from mae_jax.data.transforms import Example
from mae_jax.data.worker_processes import read_options, to_worker_processes, worker_errors

Transform = Callable[[Encoded, Any], Example]
T = TypeVar("T")
SKIP_HINT = "Mend or remove it, or set data.on_bad=skip"
log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class ExampleLoader:
    """Record number -> example, with the next good record in place of a bad one if `skip`.

    With `num_classes` a label that is none of theirs is an error, as are `max_bad` bad records and
    one more in a row.
    """

    source: Source
    transform: Transform
    skip: bool = False
    advice: str = SKIP_HINT
    num_classes: int | None = None
    max_bad: int = 100

    def __call__(self, index: int, rng: Any = None) -> dict[str, Any]:
        """The example, "label", "index": the number, "skipped": bad records from there on."""
        for skipped in range(min(len(self.source), self.max_bad + 1)):
            number = (index + skipped) % len(self.source)
            try:
                record, example = self.read(number, rng)
            except DataError as error:
                if not self.skip:
                    raise bad_image_error(self.source, number, error, self.advice) from error
                continue
            self._check_label(number, record["label"])
            return {
                **example,
                "label": np.int32(record["label"]),
                "index": np.int64(index),
                "skipped": np.int32(skipped),
            }
        raise DataError(
            f"more than data.max_bad={self.max_bad} bad images from {self.source.describe(index)} on"
        )

    def read(self, number: int, rng: Any) -> tuple[Record, Example]:
        """One record, and what the transform makes of it."""
        record = self.source[number]
        return record, self.transform(record["image"], rng)

    def _check_label(self, number: int, label: int) -> None:
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.source.describe(number)} has label {label}, which is no class from 0 to "
                f"{self.num_classes - 1}: mend it, or take another split"
            )


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Endless shuffled training batches.

    Args:
      batch_size: of all hosts together; this host yields batch_size // hosts rows of each.
      shapes: in a batch, of arrays that differ in size: each lies in the corner of its place, and
        what lies beside it means nothing.
      workers: processes that decode, each with `threads` threads; 0 decodes in this process.
      max_bad: with `skip`, the number of different bad records after which to give up.
      num_classes: where given, labels have to be below it.
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
                f"batch_size={self.batch_size} is larger than the data set of "
                f"{len(self.source)} images"
            )

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """The batches from a step on: what the transform makes, "label" [b], "index" [b]."""
        load = ExampleLoader(
            self.source,
            self.transform,
            self.skip,
            num_classes=self.num_classes,
            max_bad=self.max_bad,
        )
        examples = _order(len(self.source), self.seed).random_map(load)
        rows = _rows(examples, self.batch_size, start_step, self.host, self.hosts)
        if self.workers:
            records = to_worker_processes(rows, self.workers, self.threads)
        else:
            records = rows.to_iter_dataset(read_options(self.threads))
        iterator = iter(records)
        bad: set[int] = set()
        try:
            with worker_errors():
                size = self.batch_size // self.hosts
                for batch in collate(iterator, size, self.source, self.shapes):
                    _note_skipped(load, batch.pop("skipped"), batch["index"], bad)
                    yield batch
        finally:
            iterator.close()

    def numbers(self, step: int) -> list[int]:
        """Which records the batch of a step has, on all hosts."""
        return _record_indices(len(self.source), self.seed, self.batch_size, step)


@dataclass(frozen=True, kw_only=True)
class ArrayLoader:
    """Endless batches of rows of arrays in memory, in the order in which `Loader` has records."""

    arrays: Mapping[str, np.ndarray]
    seed: int
    batch_size: int
    host: int = 0
    hosts: int = 1

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """The batches from a step on: rows of each array."""
        count = len(next(iter(self.arrays.values())))
        order = _order(count, self.seed)
        numbers = _rows(order, self.batch_size, start_step, self.host, self.hosts)
        for rows in numbers.batch(self.batch_size // self.hosts):
            yield {name: array[rows] for name, array in self.arrays.items()}

    def numbers(self, step: int) -> list[int]:
        """Which rows the batch of a step has, on all hosts."""
        count = len(next(iter(self.arrays.values())))
        return _record_indices(count, self.seed, self.batch_size, step)


def _order(count: int, seed: int) -> grain.MapDataset:
    """Record numbers, shuffled anew in every epoch."""
    # A repeat without end overflows.
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat(10**9)


def _record_indices(count: int, seed: int, batch_size: int, step: int) -> list[int]:
    order: Any = _order(count, seed)
    return [int(order[step * batch_size + row]) for row in range(batch_size)]


def _rows(
    dataset: grain.MapDataset, batch_size: int, start_step: int, host: int, hosts: int
) -> grain.MapDataset:
    """This host's rows of all batches from a step on.

    A batch is a slice of the global order, and a host's part a slice of the batch: so the global
    batch is the same, row for row, on any number of hosts.
    """
    place = partial(_global_index, batch_size=batch_size, host=host, hosts=hosts)
    begin = start_step * (batch_size // hosts)
    rows = grain.MapDataset.range(begin, len(dataset) // hosts)
    return rows.map(lambda number: dataset[place(number)])


def _global_index(number: int, batch_size: int, host: int, hosts: int) -> int:
    """Where in the global order a host's row is that it comes to as its `number`-th."""
    per_host = batch_size // hosts
    step, offset = divmod(number, per_host)
    return step * batch_size + host * per_host + offset


def _note_skipped(
    load: ExampleLoader, skipped: np.ndarray, index: np.ndarray, bad: set[int]
) -> None:
    for row in np.flatnonzero(skipped):
        for offset in range(skipped[row]):
            _record_bad(load, int(index[row] + offset) % len(load.source), bad)


def _record_bad(load: ExampleLoader, number: int, bad: set[int]) -> None:
    """Names a bad record in the log, once; DataError if there are more than may be."""
    if number in bad:
        return
    bad.add(number)
    key = load.source.describe(number)
    try:
        load.read(number, np.random.default_rng(0))
    except DataError as error:
        log.warning("skipped a bad image (%d so far): %s: %s", len(bad), key, error)
    if len(bad) > load.max_bad:
        raise DataError(f"more than data.max_bad={load.max_bad} bad images; the last one was {key}")


def eval_batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    threads: int = 2,
    skip: bool = False,
    advice: str = SKIP_HINT,
    max_bad: int = 100,
    num_classes: int | None = None,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Every record once, in order; the last batch is filled up with copies marked "valid" False.

    With `skip` a bad record is not valid either, and named in the log, up to `max_bad`; what stands
    in its place is the next good one. `advice` ends the error about a bad record. As in `Loader`, a
    batch is of all hosts together, and a host yields its rows of it.
    """
    bad: set[int] = set()
    load = ExampleLoader(source, transform, skip, advice, num_classes, max_bad)
    last, per_host = len(source) - 1, batch_size // hosts
    count = -(-len(source) // batch_size) * per_host
    place = partial(_global_index, batch_size=batch_size, host=host, hosts=hosts)
    records = ordered_parallel_map(lambda i: load(min(place(i), last)), count, threads)
    for number, batch in enumerate(collate(records, per_host, source, {})):
        position = place(number * per_host) + np.arange(per_host)
        valid = (position <= last) & (batch.pop("skipped") == 0)
        for index in position[(position <= last) & ~valid]:
            _record_bad(load, int(index), bad)
        yield batch | {"valid": valid}


def ordered_parallel_map(function: Callable[[int], T], count: int, threads: int) -> Iterator[T]:
    """function(0), function(1), ... function(count - 1), computed by threads."""
    boxed = grain.MapDataset.range(count).map(lambda number: (function(number),))
    for (result,) in boxed.to_iter_dataset(read_options(threads)):  # it would skip a bare None
        yield result


def available_cpus() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
