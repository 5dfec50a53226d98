"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import optax

from mae_jax import flops, sharding
from mae_jax.checkpoint import Checkpointer, locked_workdir
from mae_jax.data.batches import Batch
from mae_jax.data.loader import ArrayLoader, Loader
from mae_jax.data.sources import Source
from mae_jax.evals.extract import extract
from mae_jax.evaluation import Evaluation, over_devices, print_summary, summary_of
from mae_jax.feed import Feed
from mae_jax.health import StopSignal, check_finite
from mae_jax.metrics import RunLog, write_json
from mae_jax.recipe import Config, data, judges, schedule, tasks
from mae_jax.recipe.schedule import Duration
from mae_jax.start import ConfigError, origin, run_keys, starting_state
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import Hook, TrainState, fit, make_train_step

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


def build(config: Config, workdir: Path) -> Run:
    """Reads and checks the config, and opens the data.

    Raises:
      ConfigError, DataError: a value, a file or a folder is not as it should be.
    """
    try:
        judges.check_evaluation(config)
        data.check_seeds(config)
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
            tx=schedule.make_optimizer(config, learning_rate, blocks)
            if duration.total_steps
            else optax.identity(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run(config: Config, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or continues to.

    Raises:
      ConfigError, DataError, CheckpointError: bad input, found before training or during it.
      NonFiniteError: the loss stopped being a number.
    """
    config.lock()
    with StopSignal() as stop:
        parts = build(config, workdir)
        with locked_workdir(workdir):
            _train(parts, stop)


def _train(run: Run, stop: StopSignal) -> None:
    config, total = run.config, run.duration.total_steps
    plain = json.loads(json.dumps(config.to_dict()))  # as it will be read back: without tuples
    meta = {
        "config": plain,
        "data_fingerprint": run.train_source.fingerprint(),
        "classes": run.train_source.classes,
        "jax": jax.__version__,
    }
    with closing(
        Checkpointer(run.workdir / "checkpoints", config.checkpoint.max_to_keep)
    ) as checkpointer:
        state, shardings = starting_state(config, run.task, run.tx, run.mesh, checkpointer, meta)
        start_step = int(state.step)
        if start_step == total > 0 and (summary := summary_of(run.workdir, total)):
            log.info(
                "this run is already complete; to evaluate it anew, name it as init.path of a run "
                "of steps=0 in another --workdir"
            )
            print_summary(summary)
            return
        write_json(run.workdir / "config.json", plain)
        _say_hello(run, start_step)

        def save(step: int, state: TrainState) -> None:
            checkpointer.save(step, vars(state), meta)

        with closing(_make_run_log(run, start_step)) as run_log:
            evaluation = _make_evaluation(run, run_log)
            hooks = [Hook(config.checkpoint.every_steps, save), *evaluation.hooks()]
            if run.loader:
                state = _fit(run, run.loader, state, shardings, hooks, run_log, stop)
            step = int(state.step)
            if total:
                save(step, state)
            if step == total:
                evaluation.finish(step, state, origin(run.workdir))
            else:
                log.info(
                    "stopped at step %d of %d; the same command continues from here", step, total
                )


def _fit(
    run: Run,
    loader: Loader,
    state: TrainState,
    shardings: TrainState,
    hooks: Sequence[Hook],
    run_log: RunLog,
    stop: StopSignal,
) -> TrainState:
    """Trains from a state on until the end of the run, or until asked to stop."""
    source = _cached(run, state) if run.config.data.cache_features else loader
    with closing(_make_feed(source, int(state.step), run.mesh, run_log)) as batches:
        return fit(
            state,
            _make_step(run, shardings),
            batches,
            total_steps=run.duration.total_steps,
            hooks=hooks,
            observer=run_log,
            check=check_finite,
            should_stop=stop,
        )


def _make_step(run: Run, shardings: TrainState):
    step = make_train_step(
        run.task,
        run.tx,
        run.learning_rate,
        run_keys(run.config)[1],
        prepare=data.make_prepare(run.config, run.mesh, run.on_device),
        accumulate=run.config.accumulate,
        ema_decay=run.config.optim.ema,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _make_feed(
    loader: Loader | ArrayLoader, start_step: int, mesh: jax.sharding.Mesh, run_log: RunLog
) -> Feed[dict[str, jax.Array]]:
    """The loader's batches from a step on, split over the devices."""

    def put(batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: rows for name, rows in batch.items() if name != "index"}
        return sharding.shard_batch(inputs, mesh)

    return Feed(loader.batches(start_step), put, run_log.batches_ready)


def _cached(run: Run, state: TrainState) -> ArrayLoader:
    """The features of all training images, in the order that the images would have come in."""
    task, config = run.task, run.config
    assert isinstance(task, Classify)
    classes = task.model.num_classes
    images = data.make_images(config, run.train_source, run.mesh, num_classes=classes, show=True)
    log.info("computing the features of %d images once", images.count)
    pooled = over_devices(jax.jit(task.pooled), run.mesh, state.params)
    found, labels = extract(lambda images: {"pooled": pooled(images)}, images)
    log.info("they take %.1f MB of memory", found["pooled"].nbytes / 1e6)
    arrays = {"pooled": found["pooled"], "label": labels}
    return ArrayLoader(arrays=arrays, seed=config.seed, batch_size=config.batch_size)


def _make_run_log(run: Run, start_step: int) -> RunLog:
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


def _make_evaluation(run: Run, run_log: RunLog) -> Evaluation:
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
    )
    return Evaluation(run_log, run.workdir, evaluators, run.duration.total_steps)
