"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import json
import logging
from contextlib import closing
from pathlib import Path

import jax

from mae_jax import distributed, flops
from mae_jax.checkpoint import Checkpointer
from mae_jax.evaluation import Evaluation, print_summary, summary_of
from mae_jax.health import StopSignal, Watchdog
from mae_jax.loop import Training
from mae_jax.metrics import RunLog
from mae_jax.parts import Run, build, choose_attention, say_hello, warn_of_space
from mae_jax.recipe import Config, data, judges, tasks
from mae_jax.start import ConfigError, origin, run_keys, starting_state
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import TrainState
from mae_jax.whole import write_json
from mae_jax.workdir import locked_workdir

log = logging.getLogger("mae_jax.run")


def run(config: Config, workdir: Path) -> None:
    """Trains what `config` describes in `workdir`, or continues to.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: bad input, found before training or
        during it.
      SaveError: a checkpoint cannot be written.
      NonFiniteError: loss or gradients were no finite numbers too many times in a row.
    """
    config.lock()
    with StopSignal() as stop:
        with distributed.together():
            parts = build(config, workdir)
        _check_same(parts)
        parts = choose_attention(parts)
        minutes = config.health.hang_minutes
        with locked_workdir(workdir), Watchdog(minutes, workdir) as watchdog:
            _train(parts, stop, watchdog)
            distributed.wait_for_all()


def _check_same(run: Run) -> None:
    """ConfigError unless all processes of the run are about the same."""
    if jax.process_count() == 1:
        return
    about = {"config": run.config.to_json_best_effort(), "data set": run.fingerprint}
    if run.eval_source:
        about["data.eval_split"] = run.eval_source.fingerprint()
    if isinstance(run.task, Pretrain) and run.task.user_mask is not None:
        about["mask.path"] = str(run.task.user_mask.tolist())
    try:
        distributed.check_same(about)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _train(run: Run, stop: StopSignal, watchdog: Watchdog) -> None:
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
            return starting_state(config, run.task, run.tx, run.layout, checkpointer, meta)

        state = start()
        start_step = int(state.step)
        with distributed.together():
            if start_step > total > 0:
                raise ConfigError(
                    f"the run is of {total} steps, and {run.workdir} holds its step {start_step} "
                    "already: ask for more steps or epochs, or use another --workdir"
                )
        summary = summary_of(run.workdir, total)
        distributed.check_same({"summary.json": str(summary)})
        if start_step == total > 0 and summary:
            log.info(
                "this run is already complete; to evaluate it anew, name it as init.path of a run "
                "of steps=0 in another --workdir"
            )
            if distributed.is_main():
                print_summary(summary)
            return
        if distributed.is_main():
            write_json(run.workdir / "config.json", plain)
        say_hello(run, start_step)
        if total:
            warn_of_space(run)

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
    total = run.duration.total_steps
    return Evaluation(run_log, run.workdir, evaluators, total, watchdog.note)
