"""A run, from its config to its summary: build, resume or start, train, evaluate, save."""

import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mae_jax.data.loader import ArrayLoader
from mae_jax.distributed import processes
from mae_jax.distributed.checkpoint_mirror import CheckpointMirror
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.distributed.inference import extract_features, with_sharded_inputs
from mae_jax.models import flops
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.train_step import TrainState
from mae_jax.train import build_data, build_model, report
from mae_jax.train.build_evaluators import has_labels, make_evaluators
from mae_jax.train.config import Config
from mae_jax.train.config_schema import as_json
from mae_jax.train.evaluators import Evaluation
from mae_jax.train.fault_tolerance import PreemptionHandler, Watchdog
from mae_jax.train.init_state import (
    PROVENANCE,
    init_provenance,
    restore_or_init,
    split_rng,
)
from mae_jax.train.loggers import RunInfo
from mae_jax.train.loop import Trainer
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.train.progress import MetricsLogger, Profiler
from mae_jax.train.resume import allowed_keys, check_compatible
from mae_jax.train.setup import RunSetup, assert_same_run, build, make_step, select_attention
from mae_jax.train.workdir import lock_workdir
from mae_jax.train.yardsticks import make_loss_check
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import local_path
from mae_jax.utils.remote import RemotePath

log = logging.getLogger("mae_jax.run")

MIRRORED_FILES = (PROVENANCE, "metrics.jsonl", "skipped.jsonl")  # with the checkpoints


def train_and_evaluate(config: Config, workdir: str | Path) -> None:
    """Train what a config describes in a workdir, or resume it, and evaluate the result.

    Raises:
      UserError: bad input, found before training or during it.
      CheckpointSaveError: a checkpoint cannot be written.
      NonFiniteError: loss or gradients were NaN/Inf for too many consecutive steps.
    """
    try:
        workdir = local_path(workdir)
    except UserError as error:
        copy = "--config.checkpoint.mirror copies the checkpoints of a run to an object store"
        raise UserError(f"--workdir: {error}. {copy}") from error
    with PreemptionHandler() as preemption:
        with processes.raise_together():
            setup = build(config, workdir)
        assert_same_run(setup)
        setup = select_attention(setup)
        minutes = config.health.hang_minutes
        with lock_workdir(workdir), Watchdog(minutes, workdir) as watchdog:
            run(setup, preemption, watchdog)
            processes.barrier()


def run(setup: RunSetup, preemption: PreemptionHandler, watchdog: Watchdog) -> None:
    """Resume or start, train to the end, save and evaluate."""
    config, workdir, total = setup.config, setup.workdir, setup.length.total_steps
    directory, mirror = workdir / "checkpoints", make_mirror(setup)
    with Checkpointer(directory, config.checkpoint.max_to_keep, mirror) as checkpointer:
        restore = partial(
            restore_or_init, config, setup.task, setup.layout, checkpointer, setup.meta
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
            check = make_loss_check(setup, logger, start_step)
            if setup.loader:
                trainer = make_trainer(
                    setup, state, logger, checkpointer, evaluation, preemption, check.step_done
                )
                state = trainer.train(state, restore)
            step = int(state.step)
            watchdog.heartbeat(f"saving after step {step}")
            if total:
                checkpointer.save(step, vars(state), setup.meta)
                checkpointer.wait()
            if step == total:
                extra = init_provenance(workdir) | check.summary()
                evaluation.evaluate_final(step, state, extra)
            else:
                log.info("stopped at step %d of %d; the same command resumes", step, total)


def make_mirror(setup: RunSetup) -> CheckpointMirror | None:
    """Return the copy of the checkpoints in an object store, if there is to be one."""
    config, address = setup.config, setup.config.checkpoint.mirror
    if address is None:
        return None
    return CheckpointMirror(
        RemotePath(address),
        setup.workdir,
        config.checkpoint.max_to_keep,
        MIRRORED_FILES,
        lambda meta: check_compatible(
            meta, setup.meta, allowed_keys(config), address, "checkpoint.mirror"
        ),
    )


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
    if wanted and not has_labels(setup.train_source, setup.eval_source):
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
        to=config.log.to,
        run=RunInfo(
            setup.workdir,
            project=config.log.project,
            name=config.log.run_name or setup.workdir.absolute().name,
            config=as_json(config),
        ),
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
    evaluation: Evaluation,
    preemption: PreemptionHandler,
    on_step: Callable[[int, Mapping[str, float]], None],
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
        meta=setup.meta,
        should_stop=preemption,
        max_bad_steps=health.max_bad_steps,
        spike_sigmas=health.spike_sigmas,
        rollbacks=health.rollbacks,
        workdir=setup.workdir,
        mesh=setup.mesh,
        shardings=setup.layout.shardings,
        on_step=on_step,
    )


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
