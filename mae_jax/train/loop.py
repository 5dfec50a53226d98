"""The training loop of a run, and what becomes of it when its numbers go wrong."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from mae_jax.data.batches import Batch
from mae_jax.data.loader import ArrayLoader, Loader
from mae_jax.data.prefetch import DevicePrefetcher
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.checkpointer import Checkpointer, CheckpointSaveError
from mae_jax.distributed.inference import extract_features
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.train_step import Hook, TrainState, fit, jit_step, make_train_step
from mae_jax.train import build_data
from mae_jax.train.evaluators import with_sharded_inputs
from mae_jax.train.fault_tolerance import (
    NonFiniteError,
    NonFiniteGuard,
    PreemptionHandler,
    Watchdog,
)
from mae_jax.train.init_state import split_rng
from mae_jax.train.metrics_writer import MetricsLogger
from mae_jax.train.parts import RunSetup

log = logging.getLogger("mae_jax.run")


@dataclass(frozen=True)
class Trainer:
    """The loop of a run, and what becomes of it when its numbers go wrong."""

    run: RunSetup
    run_log: MetricsLogger
    checkpointer: Checkpointer
    meta: dict[str, Any]
    judges: Sequence[Hook]
    stop: PreemptionHandler
    watchdog: Watchdog

    def to_the_end(self, state: TrainState, start: Callable[[], TrainState]) -> TrainState:
        """The state at the end of the run, or when asked to stop.

        Where too many steps in a row are skipped, and as often as health.rollbacks allows, the
        state from `start` goes on with the data after those steps.

        Raises:
          NonFiniteError: they are too many, and the state has been dumped.
        """
        left = self.run.config.health.rollbacks
        loader: Loader | ArrayLoader | None = self.run.loader
        assert loader is not None
        if self.run.config.data.cache_features:
            loader = _cached(self.run, state, self.watchdog)
        step = make_step(self.run)
        while True:
            guard = self._make_guard(loader, int(state.position) - int(state.step))
            state = self._fit(state, step, loader, guard)
            if not guard.halted:
                return state
            self.checkpointer.wait()
            if not left:
                self._halt(state, guard.bad_in_a_row)
            left -= 1
            position = int(state.position)
            del state  # there may not be room for two
            state = start()
            log.warning(
                "going back to step %d, and on with the batches from number %d; rollbacks left: %d",
                int(state.step),
                position,
                left,
            )
            self.run_log.rewind(int(state.step))
            moved = sharding.device_put_tree(np.int32(position), self.run.layout.shardings.position)
            state = dataclasses.replace(state, position=moved)

    def _fit(
        self,
        state: TrainState,
        step: Callable[..., Any],
        loader: Loader | ArrayLoader,
        guard: NonFiniteGuard,
    ) -> TrainState:
        def save(number: int, state: TrainState) -> None:
            if guard.bad_in_a_row:
                log.warning("no checkpoint of step %d, amid skipped ones", number)
            else:
                self.checkpointer.save(number, vars(state), self.meta)

        def check(number: int, metrics: Any) -> bool:
            self.checkpointer.check()
            return guard.check(number, metrics)

        every = self.run.config.checkpoint.every_steps
        note_ready = self.run_log.batches_ready
        feed = make_prefetcher(loader, int(state.position), self.run.mesh, note_ready)
        with closing(feed) as batches:
            return fit(
                state,
                step,
                batches,
                total_steps=self.run.duration.total_steps,
                hooks=[Hook(every, save), *self.judges],
                observer=self.run_log,
                check=check,
                should_stop=self.stop,
            )

    def _make_guard(self, loader: Loader | ArrayLoader, offset: int) -> NonFiniteGuard:
        """`offset`: by how much the number of a step's batch is ahead of it."""
        health, name = self.run.config.health, self.run.train_source.key
        if isinstance(loader, ArrayLoader):
            name = "row {} of the features".format

        def names(step: int) -> list[str]:
            return [name(number) for number in loader.numbers(step - 1 + offset)]

        return NonFiniteGuard(
            max_bad_steps=health.max_bad_steps,
            spike_sigmas=health.spike_sigmas,
            images=names,
            note_skipped=self.run_log.skipped,
            note_spike=self.run_log.scalars,
        )

    def _halt(self, state: TrainState, bad_in_a_row: int) -> NoReturn:
        folder, images = self.run.workdir / "halted", self.run.workdir / "skipped.jsonl"
        with processes.raise_together():
            if processes.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier halt
        dumped = f"{folder} holds the state"
        try:
            with Checkpointer(folder, 1) as dump:
                dump.save(int(state.step), vars(state), self.meta)
        except CheckpointSaveError as error:
            dumped = f"the state could not be dumped ({error})"
        raise NonFiniteError(
            "the loss or the gradients are no finite numbers, "
            f"{bad_in_a_row} time(s) in a row, up to step "
            f"{int(state.step)}. These steps changed nothing; {dumped}, {images} names the images. "
            "The same command goes back to the last checkpoint, or begins anew where there is "
            "none; if it comes to this again, lower optim.base_lr, set optim.clip_norm=1.0, or let "
            "health.rollbacks=1 go round these images"
        )


def make_step(run: RunSetup) -> Callable[..., Any]:
    """The jitted train step of a run, which donates its state."""
    step = make_train_step(
        run.task,
        run.tx,
        run.learning_rate,
        split_rng(run.config)[1],
        prepare=build_data.make_device_preprocess(run.config, run.mesh, run.on_device),
        accumulate=run.config.accumulate,
        ema_decay=run.config.optim.ema,
    )
    return jit_step(step, run.layout.shardings)


def make_prefetcher(
    loader: Loader | ArrayLoader,
    position: int,
    mesh: jax.sharding.Mesh,
    note_ready: Callable[[int], None],
) -> DevicePrefetcher[dict[str, jax.Array]]:
    """The loader's batches from a number on, split over the devices; `note_ready` as in Feed."""

    def put(batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: rows for name, rows in batch.items() if name != "index"}
        return sharding.shard_batch(inputs, mesh)

    return DevicePrefetcher(loader.batches(position), put, note_ready)


def _cached(run: RunSetup, state: TrainState, watchdog: Watchdog) -> ArrayLoader:
    """The features of all training images, in the order that the images would have come in."""
    task, config = run.task, run.config
    assert isinstance(task, Classify)
    classes = task.model.num_classes
    images = build_data.make_eval_batches(
        config, run.train_source, run.mesh, num_classes=classes, show=True, note=watchdog.note
    )
    log.info("computing the features of %d images once", images.count)
    pooled = with_sharded_inputs(jax.jit(task.pooled), run.mesh, state.params)
    found, labels = extract_features(lambda images: {"pooled": pooled(images)}, images)
    log.info("they take %.1f MB of memory", found["pooled"].nbytes / 1e6)
    arrays = {"pooled": found["pooled"], "label": labels}
    return ArrayLoader(
        arrays=arrays,
        seed=config.seed,
        batch_size=config.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
