"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax

from mae_jax import distributed, flops, sharding
from mae_jax.checkpoint import Checkpointer
from mae_jax.data.batches import Batch
from mae_jax.data.loader import ArrayLoader, Loader
from mae_jax.data.sources import Source
from mae_jax.evals.extract import extract
from mae_jax.evaluation import Evaluation, over_devices, print_summary, summary_of
from mae_jax.feed import Feed
from mae_jax.health import Guard, NonFiniteError, StopSignal, Watchdog
from mae_jax.metrics import RunLog, write_json
from mae_jax.recipe import Config, data, judges, schedule, tasks
from mae_jax.recipe.schedule import Duration
from mae_jax.start import ConfigError, Layout, make_layout, origin, run_keys, starting_state
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import Hook, TrainState, fit, make_train_step
from mae_jax.workdir import locked_workdir

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class Run:
    """The parts of a run, all checked before anything is written or trained."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Pretrain | Classify
    train_source: Source
    eval_source: Source | None
    loader: Loader | None  # None where nothing is trained
    on_device: bool  # whether crops are resized there
    duration: Duration
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    layout: Layout


def build(config: Config, workdir: Path) -> Run:
    """Reads and checks the config, and opens the data.

    Raises:
      ConfigError, DataError: a value, a file or a folder is not as it should be.
    """
    try:
        judges.check_evaluation(config)
        data.check_seeds(config)
        _check_health(config)
        mesh = sharding.make_mesh(config.mesh.fsdp)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
        index_dir = Path(os.path.abspath(workdir)).parent / ".indices"
        train_source = data.make_train_source(config, index_dir)
        eval_source = data.make_eval_source(config, train_source.classes, index_dir)
        task = tasks.make_task(config, mesh, train_source.classes)
        classifies = isinstance(task, Classify)
        duration = schedule.make_duration(config, len(train_source))
        learning_rate = schedule.make_learning_rate(config, duration)
        blocks = task.train_last_blocks if classifies else None
        loader = None
        kind = data.value_type(config, train_source)
        if eval_source:
            data.value_type(config, eval_source)
        if duration.total_steps:
            classes = task.model.num_classes if classifies else None
            loader = data.make_loader(config, train_source, classes, kind)
        tx = optax.identity()
        if duration.total_steps:
            tx = schedule.make_optimizer(config, learning_rate, blocks)
        return Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            task=task,
            train_source=train_source,
            eval_source=eval_source,
            loader=loader,
            on_device=data.resizes_on_device(config, kind),
            duration=duration,
            learning_rate=learning_rate,
            tx=tx,
            layout=make_layout(config, task, tx, mesh),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_health(config: Config) -> None:
    """ValueError for limits that cannot be."""
    health, profile = config.health, config.log
    for name, value, least in (
        ("health.max_bad_steps", health.max_bad_steps, 1),
        ("health.rollbacks", health.rollbacks, 0),
        ("health.spike_sigmas", health.spike_sigmas, 0),
        ("health.hang_minutes", health.hang_minutes, 0),
        ("log.profile_from", 1 if profile.profile_from is None else profile.profile_from, 1),
        ("log.profile_steps", profile.profile_steps, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def run(config: Config, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or continues to.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: bad input, found before training or
        during it.
      SaveError: a checkpoint cannot be written.
      NonFiniteError: too many losses in a row were no numbers.
    """
    config.lock()
    with StopSignal() as stop:
        with distributed.together():
            parts = build(config, workdir)
        _check_same(parts)
        minutes = config.health.hang_minutes
        with locked_workdir(workdir), Watchdog(minutes, workdir) as watchdog:
            _train(parts, stop, watchdog)
            distributed.wait_for_all()


def _check_same(run: Run) -> None:
    """ConfigError unless all processes of the run are about the same."""
    try:
        distributed.check_same(
            {"config": run.config.to_json_best_effort(), "data set": run.train_source.fingerprint()}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _train(run: Run, stop: StopSignal, watchdog: Watchdog) -> None:
    config, total = run.config, run.duration.total_steps
    plain = json.loads(json.dumps(config.to_dict()))  # as it will be read back: without tuples
    meta = {
        "config": plain,
        "data_fingerprint": run.train_source.fingerprint(),
        "classes": list(run.train_source.classes),
        "jax": jax.__version__,
    }
    with Checkpointer(run.workdir / "checkpoints", config.checkpoint.max_to_keep) as checkpointer:

        def start() -> TrainState:
            return starting_state(config, run.task, run.tx, run.layout, checkpointer, meta)

        state = start()
        start_step = int(state.step)
        if start_step == total > 0 and (summary := summary_of(run.workdir, total)):
            log.info(
                "this run is already complete; to evaluate it anew, name it as init.path of a run "
                "of steps=0 in another --workdir"
            )
            if distributed.is_main():
                print_summary(summary)
            return
        if distributed.is_main():
            write_json(run.workdir / "config.json", plain)
        _say_hello(run, start_step)
        if total:
            _warn_of_space(run)

        with closing(_make_run_log(run, start_step, watchdog)) as run_log:
            evaluation = _make_evaluation(run, run_log, watchdog)
            if run.loader:
                judges = evaluation.hooks()
                training = Training(run, run_log, checkpointer, meta, judges, stop, watchdog)
                state = training.to_the_end(state, start)
            step = int(state.step)
            watchdog.note(f"saving after step {step}")
            if total:
                checkpointer.save(step, vars(state), meta)
                checkpointer.wait()
            if step == total:
                evaluation.finish(step, state, origin(run.workdir))
            else:
                log.info(
                    "stopped at step %d of %d; the same command continues from here", step, total
                )


@dataclass(frozen=True)
class Training:
    """The loop of a run, and what becomes of it when its numbers go wrong."""

    run: Run
    run_log: RunLog
    checkpointer: Checkpointer
    meta: dict[str, Any]
    judges: Sequence[Hook]
    stop: StopSignal
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
        step = _make_step(self.run)
        while True:
            guard = self._make_guard(loader, int(state.position) - int(state.step))
            state = self._fit(state, step, loader, guard)
            if not guard.halted:
                return state
            if not left:
                self._halt(state)
            left -= 1
            position = int(state.position)
            self.checkpointer.wait()
            state = start()
            log.warning(
                "going back to step %d, and on with the batches from number %d; rollbacks left: %d",
                int(state.step),
                position,
                left,
            )
            self.run_log.rewind(int(state.step))
            moved = sharding.put(np.int32(position), self.run.layout.shardings.position)
            state = dataclasses.replace(state, position=moved)

    def _fit(
        self,
        state: TrainState,
        step: Callable[..., Any],
        loader: Loader | ArrayLoader,
        guard: Guard,
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
        feed = _make_feed(loader, int(state.position), self.run.mesh, self.run_log)
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

    def _make_guard(self, loader: Loader | ArrayLoader, offset: int) -> Guard:
        """`offset`: by how much the number of a step's batch is ahead of it."""
        health, images = self.run.config.health, self.run.train_source

        def names(step: int) -> list[str]:
            return [images.key(number) for number in loader.numbers(step - 1 + offset)]

        return Guard(
            max_bad_steps=health.max_bad_steps,
            spike_sigmas=health.spike_sigmas,
            images=names,
            note_skipped=self.run_log.skipped,
            note_spike=self.run_log.scalars,
        )

    def _halt(self, state: TrainState) -> NoReturn:
        folder, images = self.run.workdir / "halted", self.run.workdir / "skipped.jsonl"
        with distributed.together():
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier halt
        with Checkpointer(folder, 1) as dump:
            dump.save(int(state.step), vars(state), self.meta)
        raise NonFiniteError(
            "the loss or the gradients are no finite numbers, "
            f"{self.run.config.health.max_bad_steps} time(s) in a row, up to step "
            f"{int(state.step)}. These steps changed nothing; {folder} holds the state, {images} "
            "names the images. The same command goes back to the last checkpoint; if it comes to "
            "this again, lower optim.base_lr, set optim.clip_norm=1.0, or let health.rollbacks=1 "
            "go round these images"
        )


def _make_step(run: Run):
    step = make_train_step(
        run.task,
        run.tx,
        run.learning_rate,
        run_keys(run.config)[1],
        prepare=data.make_prepare(run.config, run.mesh, run.on_device),
        accumulate=run.config.accumulate,
        ema_decay=run.config.optim.ema,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(run.layout.shardings, None))


def _make_feed(
    loader: Loader | ArrayLoader, position: int, mesh: jax.sharding.Mesh, run_log: RunLog
) -> Feed[dict[str, jax.Array]]:
    """The loader's batches from a number on, split over the devices."""

    def put(batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: rows for name, rows in batch.items() if name != "index"}
        return sharding.shard_batch(inputs, mesh)

    return Feed(loader.batches(position), put, run_log.batches_ready)


def _cached(run: Run, state: TrainState, watchdog: Watchdog) -> ArrayLoader:
    """The features of all training images, in the order that the images would have come in."""
    task, config = run.task, run.config
    assert isinstance(task, Classify)
    classes = task.model.num_classes
    images = data.make_images(
        config, run.train_source, run.mesh, num_classes=classes, show=True, note=watchdog.note
    )
    log.info("computing the features of %d images once", images.count)
    pooled = over_devices(jax.jit(task.pooled), run.mesh, state.params)
    found, labels = extract(lambda images: {"pooled": pooled(images)}, images)
    log.info("they take %.1f MB of memory", found["pooled"].nbytes / 1e6)
    arrays = {"pooled": found["pooled"], "label": labels}
    return ArrayLoader(
        arrays=arrays,
        seed=config.seed,
        batch_size=config.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def _make_run_log(run: Run, start_step: int, watchdog: Watchdog) -> RunLog:
    first, count = run.config.log.profile_from, run.config.log.profile_steps
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return RunLog(
        run.workdir,
        start_step=start_step,
        total_steps=run.duration.total_steps,
        steps_per_epoch=run.duration.steps_per_epoch,
        batch_size=run.config.batch_size,
        every=run.config.log.every_steps,
        flops_per_image=tasks.flops_per_image(run.config, run.task),
        peak_flops=peak and peak * jax.device_count(),
        advice=data.advice(run.config, run.on_device),
        profile=None if first is None else (first, count),
        note=watchdog.note,
        main=distributed.is_main(),
    )


def _warn_of_space(run: Run) -> None:
    """Says so where the checkpoints that are kept, and one more, will not fit onto the disk."""
    leaves = jax.tree.leaves(run.layout.shapes)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    needed = state * (run.config.checkpoint.max_to_keep + 1)
    free = shutil.disk_usage(run.workdir).free
    if needed > free:
        log.warning(
            "checkpoints will take up to %.1f GB, %.1f GB at a time, and %.1f GB are free in %s: "
            "the run ends at the first that does not fit",
            needed / 1e9,
            state / 1e9,
            free / 1e9,
            run.workdir,
        )


def _say_hello(run: Run, start_step: int) -> None:
    config, duration, task = run.config, run.duration, run.task
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    listed = ", ".join(f"{_count(size)} in {part}" for part, size in sizes.items())
    if isinstance(task, Pretrain):
        listed += f"; {task.num_kept} of {task.num_patches} patches are visible"
    elif task.train_last_blocks is not None:
        last = f" and the last {task.train_last_blocks} blocks" if task.train_last_blocks else ""
        listed += f"; trained: the head{last}"
    log.info("parameters: %s", listed)
    log.info(
        "%d images, %d steps of %d (%.1f epochs) from step %d, on %d x %s",
        len(run.train_source),
        duration.total_steps,
        config.batch_size,
        duration.total_steps / duration.steps_per_epoch,
        start_step,
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    if duration.total_steps:
        log.info(
            "learning rate %.6g = base_lr %.6g * batch_size %d / 256, after %g steps of warm-up",
            schedule.peak_learning_rate(config),
            config.optim.base_lr,
            config.batch_size,
            duration.warmup_steps,
        )
    if config.eval.knn_every_epochs >= 0 and not judges.can_measure_features(
        config, run.train_source, run.eval_source
    ):
        log.info("k-NN is off: it needs labels and an evaluation split (data.eval_split)")


def _count(size: int) -> str:
    return f"{size / 1e6:.1f} M" if size >= 1e5 else f"{size:,}"


def _make_evaluation(run: Run, run_log: RunLog, watchdog: Watchdog) -> Evaluation:
    evaluators = judges.make_evaluators(
        run.config,
        run.task,
        train_source=run.train_source,
        eval_source=run.eval_source,
        duration=run.duration,
        mesh=run.mesh,
        run_log=run_log,
        workdir=run.workdir,
        init_key=run_keys(run.config)[0],
        note=watchdog.note,
    )
    return Evaluation(run_log, run.workdir, evaluators, run.duration.total_steps)
