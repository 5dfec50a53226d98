"""The loader of a run alone, its step alone, and both: what a batch takes."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import jax
import numpy as np

from benchmarks.machine import busy_seconds, cpu_seconds
from mae_jax.data.prefetch import DevicePrefetcher
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.tasks.train_step import Batch, fit
from mae_jax.train.init_state import restore_or_init
from mae_jax.train.loop import make_prefetcher, make_step
from mae_jax.train.parts import RunSetup

WARM_UP = 3  # steps before those that count: what was read ahead of them is used up by then
KEPT = 2  # batches that the step alone takes one after the other
Taken = dict[str, float]  # what a turn took, by the names that `Clock.read` and `Watch` have


class Clock:
    """Counts from when it was made."""

    def __init__(self):
        self._begin = self._now()

    def read(self, images: int) -> Taken:
        """What so many images took.

        seconds; images_per_s; cpu_ms: of processor time, of this process and all its children, per
        image; others: how many of the cores were busy with something else, on average.
        """
        seconds, own, busy = (now - begin for now, begin in zip(self._now(), self._begin))
        return {
            "seconds": seconds,
            "images_per_s": images / seconds,
            "cpu_ms": 1e3 * own / images,
            "others": max(busy - own, 0.0) / seconds,
        }

    def _now(self) -> tuple[float, float, float]:
        return time.perf_counter(), cpu_seconds(os.getpid()), busy_seconds()


class Watch:
    """Observes a loop, and times so many steps after the first WARM_UP.

    data_wait and data_ready are what metrics.jsonl has of these names.
    """

    def __init__(self, start: int, steps: int, batch_size: int):
        self.first, self.last = start + WARM_UP, start + WARM_UP + steps
        self.found: Taken = {}
        self._images = steps * batch_size
        self._clock: Clock | None = None
        self._waited, self._ready = 0.0, []

    def batches_ready(self, number: int) -> None:
        if self._clock:
            self._ready.append(number)

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._clock:
            self._waited += time.perf_counter() - begin

    def computing(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def paused(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def step_done(self, step: int, metrics: Any) -> None:
        if step == self.first:
            self._clock = Clock()
        elif step == self.last and self._clock:
            self.found = self._clock.read(self._images)
            self.found["data_wait"] = min(self._waited / self.found["seconds"], 1.0)
            self.found["data_ready"] = float(np.mean(self._ready or [0]))


class Trainer:
    """The jitted step of a run, and the state that it changes; `first_step_s` is with compiling."""

    def __init__(self, run: RunSetup):
        with Checkpointer(run.workdir / "checkpoints", 1) as checkpointer:
            self.state = restore_or_init(run.config, run.task, run.tx, run.layout, checkpointer, {})
        self._step = make_step(run)
        kept = _kept(run, 0)
        begin = time.perf_counter()
        self.train(iter(kept), Watch(0, 1, 0), 1)
        self.first_step_s = time.perf_counter() - begin

    def position(self) -> int:
        """The number of the next batch, and of the steps so far."""
        return int(self.state.position)

    def train(self, batches: Iterator[Batch], watch: Watch, total_steps: int) -> None:
        """The loop of a run, up to that step."""
        self.state = fit(
            self.state,
            self._step,
            batches,
            total_steps=total_steps,
            hooks=[],
            observer=watch,
            check=lambda step, metrics: True,
            should_stop=lambda step: False,
        )


def loader_alone(trainer: Trainer, run: RunSetup, steps: int) -> Taken:
    """Reading, and bringing batches to the devices."""
    with closing(_feed(run, trainer.position())) as batches:
        for _ in range(WARM_UP):
            jax.block_until_ready(next(batches))
        clock = Clock()
        for _ in range(steps):
            jax.block_until_ready(next(batches))
        return clock.read(steps * run.config.batch_size)


def step_alone(trainer: Trainer, run: RunSetup, steps: int) -> Taken:
    """The loop, on batches that lie on the devices."""
    kept = _kept(run, trainer.position())
    watch = Watch(trainer.position(), steps, run.config.batch_size)
    trainer.train(itertools.cycle(kept), watch, watch.last + 1)
    return watch.found


def both(trainer: Trainer, run: RunSetup, steps: int) -> Taken:
    """The loop, on batches that are read beside it."""
    watch = Watch(trainer.position(), steps, run.config.batch_size)
    with closing(_feed(run, trainer.position(), watch.batches_ready)) as batches:
        trainer.train(batches, watch, watch.last + 1)
    return watch.found


def _feed(
    run: RunSetup, position: int, note_ready: Callable[[int], None] = lambda _: None
) -> DevicePrefetcher[Batch]:
    assert run.loader
    return make_prefetcher(run.loader, position, run.mesh, note_ready)


def _kept(run: RunSetup, position: int) -> list[Batch]:
    """A few batches, on the devices."""
    with closing(_feed(run, position)) as batches:
        return list(itertools.islice(batches, KEPT))


TURNS = {"loader": loader_alone, "step": step_alone, "both": both}
