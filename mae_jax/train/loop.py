"""The training loop, and rollback or abort on NaN/Inf."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jax
import numpy as np

from mae_jax.data.collate import Batch as HostBatch
from mae_jax.data.loader import ArrayLoader, Loader
from mae_jax.data.prefetch import DevicePrefetcher
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.checkpointer import Checkpointer, CheckpointSaveError
from mae_jax.tasks.train_step import Batch, Metrics, TrainState
from mae_jax.train.fault_tolerance import NonFiniteError, NonFiniteGuard, PreemptionHandler
from mae_jax.train.progress import MetricsLogger

log = logging.getLogger("mae_jax.run")

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Hook:
    """Calls `run(step, state)` after every `every` steps."""

    every: int
    run: Callable[[int, TrainState], object]


class LoopObserver(Protocol):
    """Sees every step, one step late, so that the devices never wait for the host."""

    def waiting(self, step: int) -> AbstractContextManager[None]:
        """Return a context in which the loop waits for the data of a step."""
        ...

    def computing(self, step: int) -> AbstractContextManager[None]:
        """Return a context that dispatches a step and awaits the one before it."""
        ...

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Handle the metrics of a finished step, counted from 1."""
        ...

    def paused(self, step: int) -> AbstractContextManager[None]:
        """Return a context in which the loop saves or evaluates after a step."""
        ...


def fit(
    state: TrainState,
    train_step: TrainStep,
    batches: Iterator[Batch],
    *,
    total_steps: int,
    hooks: Sequence[Hook],
    observer: LoopObserver,
    check: Callable[[int, Mapping[str, float]], bool],
    should_stop: Callable[[int], bool],
) -> TrainState:
    """Train until `total_steps`, until `should_stop(step)`, or until `check` fails.

    `check(step, metrics)` sees every step; hooks run only for states that passed it.
    """
    pending: list[tuple[int, Metrics]] = []  # steps whose metrics have not been read

    def observe() -> bool:
        passed = True
        for step, metrics in pending:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            passed = check(step, values)
            observer.step_done(step, values)
        pending.clear()
        return passed

    for step in range(int(state.step) + 1, total_steps + 1):
        with observer.waiting(step):
            batch = next(batches)
        with observer.computing(step):
            state, metrics = train_step(state, batch)
            passed = observe()
        pending.append((step, metrics))
        stopping = should_stop(step)
        due = [hook for hook in hooks if step % hook.every == 0]
        if due and passed and not stopping:  # a preempted run has no time for evaluation
            passed = observe()
            with observer.paused(step):
                for hook in due if passed else ():
                    hook.run(step, state)
        if stopping or not passed:
            break
    observe()
    return state


@dataclass(frozen=True)
class Trainer:
    """Trains with checkpoints and evaluation, and rolls back or aborts on NaN/Inf.

    Args:
      example_name: name of the training image with an index, for logs.
      max_bad_steps, spike_sigmas: as in `NonFiniteGuard`.
      meta: metadata of the checkpoints.
      on_step: called with every finished step and its metrics.
    """

    loader: Loader | ArrayLoader
    example_name: Callable[[int], str]
    train_step: TrainStep
    total_steps: int
    eval_hooks: Sequence[Hook]
    logger: MetricsLogger
    checkpointer: Checkpointer
    checkpoint_every: int
    meta: Mapping[str, Any]
    should_stop: PreemptionHandler
    max_bad_steps: int
    spike_sigmas: float
    rollbacks: int
    workdir: Path
    mesh: jax.sharding.Mesh
    shardings: TrainState
    on_step: Callable[[int, Mapping[str, float]], None] = lambda *_: None

    def train(self, state: TrainState, restore: Callable[[], TrainState]) -> TrainState:
        """Return the state at the end of the run, or when the run is preempted.

        After too many consecutive skipped steps, and up to `rollbacks` times, training continues
        from the state of `restore` with the data after those steps.

        Raises:
          NonFiniteError: no rollback is left; the state has been dumped.
        """
        rollbacks = self.rollbacks
        while True:
            guard = self._make_guard(offset=int(state.position) - int(state.step))
            state = self._fit(state, guard)
            if not guard.aborted:
                return state
            self.checkpointer.wait()
            if not rollbacks:
                self._abort(state, guard.consecutive_bad)
            rollbacks -= 1
            position = int(state.position)
            del state  # there may not be room for two
            state = restore()
            log.warning(
                "rolling back to step %d, continuing with batch %d; rollbacks left: %d",
                int(state.step),
                position,
                rollbacks,
            )
            self.logger.rewind(int(state.step))
            moved = sharding.device_put_tree(np.int32(position), self.shardings.position)
            state = dataclasses.replace(state, position=moved)

    def _fit(self, state: TrainState, guard: NonFiniteGuard) -> TrainState:
        def save(step: int, state: TrainState) -> None:
            if guard.consecutive_bad:
                log.warning("no checkpoint at step %d, since it was skipped", step)
            else:
                self.checkpointer.save(step, vars(state), self.meta)

        def check(step: int, metrics: Mapping[str, float]) -> bool:
            self.checkpointer.raise_if_failed()
            self.on_step(step, metrics)
            return guard.check(step, metrics)

        prefetcher = make_prefetcher(
            self.loader, int(state.position), self.mesh, self.logger.batches_ready
        )
        with closing(prefetcher) as batches:
            return fit(
                state,
                self.train_step,
                batches,
                total_steps=self.total_steps,
                hooks=[Hook(self.checkpoint_every, save), *self.eval_hooks],
                observer=self.logger,
                check=check,
                should_stop=self.should_stop,
            )

    def _make_guard(self, offset: int) -> NonFiniteGuard:
        """Return a guard for steps whose batch has index step - 1 + offset."""

        def image_names(step: int) -> list[str]:
            indices = self.loader.record_indices(step - 1 + offset)
            return [self.example_name(index) for index in indices]

        return NonFiniteGuard(
            max_bad_steps=self.max_bad_steps,
            spike_sigmas=self.spike_sigmas,
            image_names=image_names,
            on_skip=self.logger.writer.write_skipped,
            on_spike=self.logger.writer.write_scalars,
        )

    def _abort(self, state: TrainState, consecutive_bad: int) -> NoReturn:
        folder, skipped = self.workdir / "halted", self.workdir / "skipped.jsonl"
        with processes.raise_together():
            if processes.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # from an earlier abort
        dumped = f"{folder} holds the state"
        try:
            with Checkpointer(folder, 1) as dump:
                dump.save(int(state.step), vars(state), self.meta)
        except CheckpointSaveError as error:
            dumped = f"the state could not be dumped ({error})"
        raise NonFiniteError(
            f"loss or gradients were NaN/Inf for {consecutive_bad} consecutive step(s), up to step "
            f"{int(state.step)}. These steps changed nothing; {dumped}, {skipped} names the "
            "images. The same command resumes from the last checkpoint, or starts over if there is "
            "none; if it aborts again, lower optim.base_lr, set optim.clip_norm=1.0, or let "
            "health.rollbacks=1 skip these images"
        )


def make_prefetcher(
    loader: Loader | ArrayLoader,
    position: int,
    mesh: jax.sharding.Mesh,
    on_ready: Callable[[int], None],
) -> DevicePrefetcher[Batch]:
    """Return the loader's batches from an index on, sharded over the devices.

    Args:
      on_ready: as in DevicePrefetcher.
    """

    def put(batch: HostBatch) -> Batch:
        inputs = {name: rows for name, rows in batch.items() if name != "index"}
        return sharding.shard_batch(inputs, mesh)

    return DevicePrefetcher(loader.batches(position), put, on_ready)
