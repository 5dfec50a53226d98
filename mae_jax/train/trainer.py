"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import json
import logging
from contextlib import closing
from pathlib import Path

import jax

from mae_jax.distributed import processes
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.models import flops
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState
from mae_jax.train import Config, build_data, build_model, judges
from mae_jax.train.evaluators import Evaluation, print_summary, read_summary
from mae_jax.train.fault_tolerance import PreemptionHandler, Watchdog
from mae_jax.train.init_state import ConfigError, init_provenance, restore_or_init, split_rng
from mae_jax.train.loop import Trainer
from mae_jax.train.metrics_writer import MetricsLogger
from mae_jax.train.parts import (
    RunSetup,
    build,
    choose_attention,
    log_run_summary,
    warn_low_disk_space,
)
from mae_jax.train.workdir import lock_workdir
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax.run")


def train_and_evaluate(config: Config, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or continues to.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: bad input, found before training or
        during it.
      SaveError: a checkpoint cannot be written.
      NonFiniteError: loss or gradients were no finite numbers too many times in a row.
    """
    config.lock()
    with PreemptionHandler() as stop:
        with processes.raise_together():
            parts = build(config, workdir)
        _check_same(parts)
        parts = choose_attention(parts)
        minutes = config.health.hang_minutes
        with lock_workdir(workdir), Watchdog(minutes, workdir) as watchdog:
            _train(parts, stop, watchdog)
            processes.barrier()


def _check_same(run: RunSetup) -> None:
    """ConfigError unless all processes of the run are about the same."""
    if jax.process_count() == 1:
        return
    about = {"config": run.config.to_json_best_effort(), "data set": run.fingerprint}
    if run.eval_source:
        about["data.eval_split"] = run.eval_source.fingerprint()
    if isinstance(run.task, Pretrain) and run.task.user_mask is not None:
        about["mask.path"] = str(run.task.user_mask.tolist())
    try:
        processes.assert_equal_across_processes(about)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _train(run: RunSetup, stop: PreemptionHandler, watchdog: Watchdog) -> None:
    config, total = run.config, run.duration.total_steps
    plain = json.loads(json.dumps(config.to_dict()))  # as it will be read back: without tuples
    meta = {
        "config": plain,
        "data_fingerprint": run.fingerprint,
        "classes": list(run.train_source.classes),
        "jax": jax.__version__,
    }
    with Checkpointer(run.workdir / "checkpoints", config.checkpoint.max_to_keep) as checkpointer:

        def start() -> TrainState:
            return restore_or_init(config, run.task, run.tx, run.layout, checkpointer, meta)

        state = start()
        start_step = int(state.step)
        with processes.raise_together():
            if start_step > total > 0:
                raise ConfigError(
                    f"the run is of {total} steps, and {run.workdir} holds its step {start_step} "
                    "already: ask for more steps or epochs, or use another --workdir"
                )
        summary = read_summary(run.workdir, total)
        processes.assert_equal_across_processes({"summary.json": str(summary)})
        if start_step == total > 0 and summary:
            log.info(
                "this run is already complete; to evaluate it anew, name it as init.path of a run "
                "of steps=0 in another --workdir"
            )
            if processes.is_main():
                print_summary(summary)
            return
        if processes.is_main():
            write_json(run.workdir / "config.json", plain)
        log_run_summary(run, start_step)
        if total:
            warn_low_disk_space(run)

        with closing(_make_run_log(run, start_step, watchdog)) as run_log:
            evaluation = _make_evaluation(run, run_log, watchdog)
            if run.loader:
                judges = evaluation.hooks()
                training = Trainer(run, run_log, checkpointer, meta, judges, stop, watchdog)
                state = training.to_the_end(state, start)
            step = int(state.step)
            watchdog.note(f"saving after step {step}")
            if total:
                checkpointer.save(step, vars(state), meta)
                checkpointer.wait()
            if step == total:
                evaluation.finish(step, state, init_provenance(run.workdir))
            else:
                log.info(
                    "stopped at step %d of %d; the same command continues from here", step, total
                )


def _make_run_log(run: RunSetup, start_step: int, watchdog: Watchdog) -> MetricsLogger:
    first, count = run.config.log.profile_from, run.config.log.profile_steps
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return MetricsLogger(
        run.workdir,
        start_step=start_step,
        total_steps=run.duration.total_steps,
        steps_per_epoch=run.duration.steps_per_epoch,
        batch_size=run.config.batch_size,
        every=run.config.log.every_steps,
        flops_per_image=build_model.flops_per_image(run.config, run.task),
        peak_flops=peak and peak * jax.device_count(),
        advice=build_data.input_bound_hint(run.config, run.on_device),
        profile=None if first is None else (first, count),
        note=watchdog.note,
        main=processes.is_main(),
    )


def _make_evaluation(run: RunSetup, run_log: MetricsLogger, watchdog: Watchdog) -> Evaluation:
    evaluators = judges.make_evaluators(
        run.config,
        run.task,
        train_source=run.train_source,
        eval_source=run.eval_source,
        duration=run.duration,
        mesh=run.mesh,
        run_log=run_log,
        workdir=run.workdir,
        init_key=split_rng(run.config)[0],
        note=watchdog.note,
    )
    total = run.duration.total_steps
    return Evaluation(run_log, run.workdir, evaluators, total, watchdog.note)
