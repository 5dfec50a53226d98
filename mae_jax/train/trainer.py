"""A run, from its config to its summary: build, resume or start, train, evaluate, save."""

import dataclasses
import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax.data.loader import ArrayLoader, Loader
from mae_jax.data.sources import Source
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.distributed.inference import extract_features, with_sharded_inputs
from mae_jax.models import attention_autotune, flops
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState, jit_step, make_train_step
from mae_jax.train import build_data, build_model, report
from mae_jax.train.build_evaluators import features_enabled, make_evaluators
from mae_jax.train.build_model import RunLength
from mae_jax.train.config import Config
from mae_jax.train.config_schema import as_json
from mae_jax.train.evaluators import Evaluation
from mae_jax.train.fault_tolerance import PreemptionHandler, Watchdog
from mae_jax.train.init_state import (
    StateLayout,
    init_provenance,
    make_state_layout,
    restore_or_init,
    split_rng,
)
from mae_jax.train.loop import Trainer
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.train.progress import MetricsLogger, Profiler
from mae_jax.train.workdir import lock_workdir
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax.run")


def train_and_evaluate(config: Config, workdir: Path) -> None:
    """Train what a config describes in a workdir, or resume it, and evaluate the result.

    Raises:
      UserError: bad input, found before training or during it.
      CheckpointSaveError: a checkpoint cannot be written.
      NonFiniteError: loss or gradients were NaN/Inf for too many consecutive steps.
    """
    with PreemptionHandler() as preemption:
        with processes.raise_together():
            setup = build(config, workdir)
        assert_same_run(setup)
        setup = select_attention(setup)
        minutes = config.health.hang_minutes
        with lock_workdir(workdir), Watchdog(minutes, workdir) as watchdog:
            run(setup, preemption, watchdog)
            processes.barrier()


@dataclass(frozen=True)
class RunSetup:
    """The parts of a run, all validated before anything is written or trained."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Pretrain | Classify
    train_source: Source
    fingerprint: str  # of the training data; takes a while for millions of files
    eval_source: Source | None
    loader: Loader | None  # None if nothing is trained
    resize_on_device: bool
    length: RunLength
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    layout: StateLayout


def build(config: Config, workdir: Path) -> RunSetup:
    """Open the data, and build model, objective and optimizer.

    Raises:
      UserError: a config value, a file or a folder is invalid.
    """
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.accumulate, mesh)
    index_dir = Path(os.path.abspath(workdir)).parent / ".indices"
    train_source = build_data.make_train_source(config, index_dir)
    eval_source = build_data.make_eval_source(config, train_source.classes, index_dir)
    dtype = build_data.pixel_dtype(config, train_source)
    if eval_source:
        build_data.pixel_dtype(config, eval_source)
    task = build_model.make_task(config, mesh, train_source.classes)
    length = build_model.make_run_length(config, len(train_source))
    learning_rate = build_model.make_learning_rate(config, length)
    loader, tx = None, optax.identity()
    if length.total_steps:
        classify = task if isinstance(task, Classify) else None
        num_classes = classify.model.num_classes if classify else None
        loader = build_data.make_loader(config, train_source, num_classes, dtype)
        blocks = classify.train_last_blocks if classify else None
        tx = build_model.make_optimizer(config, learning_rate, blocks)
    return RunSetup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        task=task,
        train_source=train_source,
        fingerprint=train_source.fingerprint(),
        eval_source=eval_source,
        loader=loader,
        resize_on_device=build_data.resizes_on_device(config, dtype),
        length=length,
        learning_rate=learning_rate,
        tx=tx,
        layout=make_state_layout(config, task, tx, mesh),
    )


def assert_same_run(setup: RunSetup) -> None:
    """Raise UserError unless all processes have the same config and data."""
    if jax.process_count() == 1:
        return
    values = {"config": str(setup.config), "dataset": setup.fingerprint}
    if setup.eval_source:
        values["data.eval_split"] = setup.eval_source.fingerprint()
    if isinstance(setup.task, Pretrain) and setup.task.user_mask is not None:
        values["mask.path"] = str(setup.task.user_mask.tolist())
    processes.assert_equal_across_processes(values)


def select_attention(setup: RunSetup) -> RunSetup:
    """Return the run with the attention implementation that suits its devices.

    All processes must call this together.

    Raises:
      UserError: model.attention does not work here.
    """
    config = setup.config
    attention = attention_autotune.select_implementation(
        config.model.attention, setup.task.attention_shapes, jnp.dtype(config.model.dtype)
    )
    task = build_model.make_task(config, setup.mesh, setup.train_source.classes, attention)
    return dataclasses.replace(setup, task=task)


def run(setup: RunSetup, preemption: PreemptionHandler, watchdog: Watchdog) -> None:
    """Resume or start, train to the end, save and evaluate."""
    config, workdir, total = setup.config, setup.workdir, setup.length.total_steps
    meta = {
        "config": as_json(config),
        "data_fingerprint": setup.fingerprint,
        "classes": list(setup.train_source.classes),
        "jax": jax.__version__,
    }
    with Checkpointer(workdir / "checkpoints", config.checkpoint.max_to_keep) as checkpointer:
        restore = partial(
            restore_or_init, config, setup.task, setup.tx, setup.layout, checkpointer, meta
        )
        state = restore()
        start_step = int(state.step)
        with processes.raise_together():
            _check_length(workdir, start_step, total)
        summary = report.read_summary(workdir, total)
        processes.assert_equal_across_processes({"summary.json": str(summary)})
        if start_step == total > 0 and summary:
            _report_complete(summary)
            return
        if processes.is_main():
            write_json(workdir / "config.json", as_json(config))
        _log_start(setup, start_step)

        with closing(make_logger(setup, start_step, watchdog)) as logger:
            evaluation = make_evaluation(setup, logger)
            if setup.loader:
                trainer = make_trainer(
                    setup, state, logger, checkpointer, meta, evaluation, preemption
                )
                state = trainer.train(state, restore)
            step = int(state.step)
            watchdog.heartbeat(f"saving after step {step}")
            if total:
                checkpointer.save(step, vars(state), meta)
                checkpointer.wait()
            if step == total:
                evaluation.evaluate_final(step, state, init_provenance(workdir))
            else:
                log.info("stopped at step %d of %d; the same command resumes", step, total)


def _check_length(workdir: Path, start_step: int, total: int) -> None:
    if start_step > total > 0:
        raise UserError(
            f"the run has {total} steps, and {workdir} already holds its step {start_step}: set "
            "more steps or epochs, or use another --workdir"
        )


def _report_complete(summary: dict[str, Any]) -> None:
    log.info(
        "this run is already complete; to re-evaluate it, start a new workdir with "
        "--config.init.path=WORKDIR --config.steps=0"
    )
    if processes.is_main():
        report.print_summary(summary)


def _log_start(setup: RunSetup, start_step: int) -> None:
    config = setup.config
    num_images = len(setup.train_source)
    report.log_run_summary(config, setup.task, setup.layout, setup.length, num_images, start_step)
    wanted = config.eval.knn_every_epochs >= 0
    if wanted and not features_enabled(config, setup.train_source, setup.eval_source):
        report.log_knn_off(config, setup.eval_source)
    if setup.length.total_steps:
        report.warn_low_disk_space(setup.workdir, setup.layout, config.checkpoint.max_to_keep)


def make_logger(setup: RunSetup, start_step: int, watchdog: Watchdog) -> MetricsLogger:
    """Return the logger of the training loop, which writes on the main process only."""
    config, is_main = setup.config, processes.is_main()
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    writer = MetricsWriter(
        setup.workdir,
        start_step=start_step,
        steps_per_epoch=setup.length.steps_per_epoch,
        enabled=is_main,
    )
    first = config.log.profile_from if is_main else None
    return MetricsLogger(
        writer,
        start_step=start_step,
        total_steps=setup.length.total_steps,
        steps_per_epoch=setup.length.steps_per_epoch,
        batch_size=config.batch_size,
        every=config.log.every_steps,
        flops_per_image=build_model.flops_per_image(config, setup.task),
        peak_flops=peak and peak * jax.device_count(),
        input_bound_hint=build_data.input_bound_hint(config, setup.resize_on_device),
        profiler=Profiler(setup.workdir / "profile", first, config.log.profile_steps),
        heartbeat=watchdog.heartbeat,
        show=is_main,
    )


def make_evaluation(setup: RunSetup, logger: MetricsLogger) -> Evaluation:
    """Return the evaluators of the run."""
    evaluators = make_evaluators(
        setup.config,
        setup.task,
        train_source=setup.train_source,
        eval_source=setup.eval_source,
        length=setup.length,
        mesh=setup.mesh,
        writer=logger.writer,
        workdir=setup.workdir,
        init_key=split_rng(setup.config.seed)[0],
        heartbeat=logger.heartbeat,
    )
    total = setup.length.total_steps
    return Evaluation(logger.writer, setup.workdir, evaluators, total, logger.heartbeat)


def make_trainer(
    setup: RunSetup,
    state: TrainState,
    logger: MetricsLogger,
    checkpointer: Checkpointer,
    meta: dict[str, Any],
    evaluation: Evaluation,
    preemption: PreemptionHandler,
) -> Trainer:
    """Return the training loop of the run; `state` is the first one."""
    config, loader, example_name = setup.config, setup.loader, setup.train_source.describe
    assert loader is not None
    if config.data.cache_features:
        loader = _cache_features(setup, state, logger.heartbeat)
        example_name = "row {} of the features".format
    health = config.health
    return Trainer(
        loader=loader,
        example_name=example_name,
        train_step=make_step(setup),
        total_steps=setup.length.total_steps,
        eval_hooks=evaluation.hooks(),
        logger=logger,
        checkpointer=checkpointer,
        checkpoint_every=config.checkpoint.every_steps,
        meta=meta,
        should_stop=preemption,
        guard_options=dict(max_bad_steps=health.max_bad_steps, spike_sigmas=health.spike_sigmas),
        rollbacks=health.rollbacks,
        workdir=setup.workdir,
        mesh=setup.mesh,
        shardings=setup.layout.shardings,
    )


def make_step(setup: RunSetup) -> Callable[..., Any]:
    """Return the jitted train step, which donates its state."""
    config = setup.config
    step = make_train_step(
        setup.task,
        setup.tx,
        setup.learning_rate,
        split_rng(config.seed)[1],
        preprocess=build_data.make_device_preprocess(config, setup.mesh, setup.resize_on_device),
        grad_accum_steps=config.accumulate,
        ema_decay=config.optim.ema,
    )
    return jit_step(step, setup.layout.shardings)


def _cache_features(
    setup: RunSetup, state: TrainState, heartbeat: Callable[[str], None]
) -> ArrayLoader:
    """Compute the features of all training images; return them in the order of the images."""
    task, config = setup.task, setup.config
    assert isinstance(task, Classify)
    images = build_data.make_eval_batches(
        config,
        setup.train_source,
        setup.mesh,
        num_classes=task.model.num_classes,
        heartbeat=heartbeat,
    )
    log.info("computing the features of %d images once", images.count)
    pooled = with_sharded_inputs(jax.jit(task.pooled), setup.mesh, state.params)
    computed = extract_features(
        lambda images: {"pooled": pooled(images)}, images, show_progress=True
    )
    features = computed.features["pooled"]
    log.info("they take %.1f MB of memory", features.nbytes / 1e6)
    return ArrayLoader(
        arrays={"pooled": features, "label": computed.labels},
        seed=config.seed,
        batch_size=config.batch_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
