"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax import flops, recipe, sharding
from mae_jax.checkpoint import Checkpointer, check_resume, flatten, locked_workdir
from mae_jax.convert.info import ConvertError
from mae_jax.data.loader import Loader, ordered_batches
from mae_jax.data.sources import Source, Subset
from mae_jax.evals.knn import Knn
from mae_jax.evals.reconstruct import Pictures
from mae_jax.evaluation import Evaluation, print_summary, summary_of
from mae_jax.health import StopSignal, check_finite
from mae_jax.metrics import RunLog, write_json
from mae_jax.recipe import Config, Duration
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import Hook, TrainState, fit, init_state, make_train_step

log = logging.getLogger("mae_jax")

# Keys (or groups, ending in ".") that may differ when a run is continued: they change how the
# computation is laid out, watched and stored, but not what it computes.
FREE = (
    "init.",
    "model.remat",
    "model.scan_unroll",
    "data.path",
    "data.workers",
    "data.threads",
    "data.on_bad",
    "data.max_bad",
    "eval.",
    "log.",
    "checkpoint.",
    "resume.",
    "mesh.",
)


class ConfigError(Exception):
    """The config cannot be run; the message names the key and says what to do."""


@dataclass(frozen=True)
class Run:
    """The parts of a run, all checked before anything is written or trained."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Pretrain
    train_source: Source
    eval_source: Source | None
    loader: Loader
    knn: Knn | None
    duration: Duration
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation


def build(config: Config, workdir: Path) -> Run:
    """Reads and checks the config, and opens the data.

    Raises:
      ConfigError, DataError: a value, a file or a folder is not as it should be.
    """
    try:
        recipe.check_counts(config)
        mesh = sharding.make_mesh(config.mesh.fsdp)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
        task = recipe.make_task(config, mesh)
        train_source = recipe.make_train_source(config)
        eval_source = recipe.make_eval_source(config)
        duration = recipe.make_duration(config, len(train_source))
        learning_rate = recipe.make_learning_rate(config, duration)
        return Run(
            config=config,
            workdir=workdir,
            mesh=mesh,
            task=task,
            train_source=train_source,
            eval_source=eval_source,
            loader=recipe.make_loader(config, train_source),
            knn=recipe.make_knn(config, train_source, eval_source),
            duration=duration,
            learning_rate=learning_rate,
            tx=recipe.make_optimizer(config, learning_rate),
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
        "jax": jax.__version__,
    }
    checkpointer = Checkpointer(run.workdir / "checkpoints", config.checkpoint.max_to_keep)
    state, shardings = _start(run, checkpointer, meta)
    start_step = int(state.step)
    if start_step == total and (summary := summary_of(run.workdir, total)):
        log.info("this run is already complete")
        print_summary(summary)
        checkpointer.close()
        return
    write_json(run.workdir / "config.json", plain)
    _say_hello(run, start_step)

    def save(step: int, state: TrainState) -> None:
        checkpointer.save(step, vars(state), meta)

    save_hook = Hook(config.checkpoint.every_steps, save)
    run_log = _make_run_log(run, start_step)
    evaluation = _make_evaluation(run, run_log)
    batches = run.loader.batches(start_step)
    try:
        state = fit(
            state,
            _make_step(run, shardings),
            (_to_device(batch, run.mesh) for batch in batches),
            total_steps=total,
            hooks=[save_hook, *_evaluation_hooks(run, evaluation)],
            observer=run_log,
            check=check_finite,
            should_stop=stop,
        )
        step = int(state.step)
        save(step, state)
        if step == total:
            evaluation.finish(step, state)
        else:
            log.info("stopped at step %d of %d; the same command continues from here", step, total)
    finally:
        batches.close()
        run_log.close()
        checkpointer.close()


def _keys(config: Config) -> tuple[jax.Array, jax.Array]:
    """One key for the first parameters, one for what the steps draw."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_key, step_key


def _start(
    run: Run, checkpointer: Checkpointer, meta: dict[str, Any]
) -> tuple[TrainState, TrainState]:
    """The state to train from, and its shardings: of the newest checkpoint, else a random one."""

    def init(key: jax.Array) -> TrainState:
        return init_state(run.task, run.tx, key, with_ema=run.config.optim.ema is not None)

    key, _ = _keys(run.config)
    shapes = jax.eval_shape(init, key)
    shardings = sharding.state_shardings(shapes, run.mesh)

    def accept(old_meta: dict[str, Any]) -> None:
        old, new = (
            flatten(m["config"]) | {"data.fingerprint": m["data_fingerprint"]}
            for m in (old_meta, meta)
        )
        allow = [key.strip() for key in run.config.resume.allow.split(",")]
        check_resume(old, new, FREE, allow)

    found = checkpointer.restore_newest(vars(shapes), vars(shardings), accept)
    if found:
        log.info("continuing from step %d", found[0])
        return TrainState(**found[1]), shardings
    # Each device makes only the part of the state that it holds.
    state = jax.jit(init, out_shardings=shardings)(key)
    if run.config.init.path is None:
        return state, shardings
    return _warm(run.config, state, shardings), shardings


def _warm(config: Config, state: TrainState, shardings: TrainState) -> TrainState:
    """The first state with the parameters that init.path has for it."""
    try:
        start = recipe.make_warm_start(config, state.params)
    except ConvertError as error:
        raise ConfigError(f"init.path: {error}") from error
    params = jax.tree.map(jax.device_put, start.params, shardings.params)
    # A copy, since a step donates its state and may not be given the same buffer twice.
    ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None
    return dataclasses.replace(state, params=params, ema=ema)


def _make_step(run: Run, shardings: TrainState):
    step = make_train_step(
        run.task,
        run.tx,
        run.learning_rate,
        _keys(run.config)[1],
        accumulate=run.config.accumulate,
        ema_decay=run.config.optim.ema,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _to_device(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    return sharding.shard_batch({"image": batch["image"]}, mesh)


def _make_run_log(run: Run, start_step: int) -> RunLog:
    task = run.task
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    per_image = flops.train_flops(
        recipe.make_size(run.config),
        task.num_patches,
        task.num_kept,
        task.model.decoder.patch_values,
        run.config.model.mlp_ratio,
    )
    return RunLog(
        run.workdir,
        start_step=start_step,
        total_steps=run.duration.total_steps,
        steps_per_epoch=run.duration.steps_per_epoch,
        batch_size=run.config.batch_size,
        every=run.config.log.every_steps,
        flops_per_image=per_image,
        peak_flops=peak and peak * jax.device_count(),
    )


def _say_hello(run: Run, start_step: int) -> None:
    config, duration = run.config, run.duration
    shapes = jax.eval_shape(run.task.init, jax.random.key(0))
    millions = {
        part: sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) / 1e6 for part in shapes
    }
    log.info(
        "%.1f M parameters in the encoder, %.1f M in the decoder; %d of %d patches are visible",
        millions["encoder"],
        millions["decoder"],
        run.task.num_kept,
        run.task.num_patches,
    )
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
    peak = config.optim.base_lr * config.batch_size / 256
    log.info(
        "learning rate %.6g = base_lr %.6g * batch_size %d / 256, after %g steps of warm-up",
        peak,
        config.optim.base_lr,
        config.batch_size,
        duration.warmup_steps,
    )
    if run.knn is None:
        log.info("k-NN is off: it needs labels and an evaluation split (data.eval_split)")


def _make_evaluation(run: Run, run_log: RunLog) -> Evaluation:
    config = run.config
    # Pictures show the same images under the same masks over the whole run.
    source = Subset(run.eval_source or run.train_source, config.eval.pictures)
    transform = recipe.make_eval_transform(config)
    skip = config.data.on_bad == "skip"
    batch = next(iter(ordered_batches(source, transform, len(source), skip=skip)))
    mask = run.task.draw_mask(jax.random.key(0), len(source))
    return Evaluation(
        task=run.task,
        run_log=run_log,
        workdir=run.workdir,
        pictures=Pictures(run.task, batch["image"], mask, config.eval.stats),
        knn=run.knn,
        baseline_key=_keys(config)[0] if config.eval.knn_baselines else None,
    )


def _evaluation_hooks(run: Run, evaluation: Evaluation) -> list[Hook]:
    knn_every = run.duration.steps(run.config.eval.knn_every_epochs)
    pictures_every = run.duration.steps(run.config.eval.pictures_every_epochs)
    hooks = []
    if run.knn and knn_every:
        hooks.append(Hook(knn_every, evaluation.measure_knn))
    if pictures_every:
        hooks.append(Hook(pictures_every, evaluation.draw_pictures))
    return hooks
