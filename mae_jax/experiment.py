"""A run from its config to its summary: set up, resume or start, train, evaluate, save."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from mae_jax import flops, recipe, sharding
from mae_jax.checkpoint import Checkpointer, check_resume, flatten, locked_workdir
from mae_jax.data.loader import Loader, ordered_batches
from mae_jax.data.sources import Source, Subset
from mae_jax.evals.knn import FeatureFn, Knn
from mae_jax.evals.reconstruct import Pictures, save_png
from mae_jax.health import StopSignal, check_finite
from mae_jax.metrics import RunLog, print_table, write_json
from mae_jax.recipe import Config, Duration
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import Hook, TrainState, fit, init_state, make_train_step

log = logging.getLogger("mae_jax")

# Keys (or groups, ending in ".") that may differ when a run is continued: they change how the
# computation is laid out, watched and stored, but not what it computes.
FREE = (
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
RANDOM_ENCODERS = 3  # whose mean accuracy is the baseline


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
    meta = {
        "config": config.to_dict(),
        "data_fingerprint": run.train_source.fingerprint(),
        "jax": jax.__version__,
    }
    checkpointer = Checkpointer(run.workdir / "checkpoints", config.checkpoint.max_to_keep)
    state, shardings = _start(run, checkpointer, meta)
    start_step = int(state.step)
    write_json(run.workdir / "config.json", config.to_dict())
    _say_hello(run, start_step)

    def save(step: int, state: TrainState) -> None:
        checkpointer.save(step, vars(state), meta)

    save_hook = Hook(config.checkpoint.every_steps, save)
    run_log = _make_run_log(run, start_step)
    pictures = _pictures(run)
    batches = run.loader.batches(start_step)
    try:
        state = fit(
            state,
            _make_step(run, shardings),
            (_to_device(batch, run.mesh) for batch in batches),
            total_steps=total,
            hooks=[save_hook, *_evaluation_hooks(run, run_log, pictures)],
            observer=run_log,
            check=check_finite,
            should_stop=stop,
        )
        step = int(state.step)
        save(step, state)
        if step == total:
            _finish(run, run_log, pictures, state)
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
    step = checkpointer.latest_step()
    if step is None:
        # Each device makes only the part of the state that it holds.
        return jax.jit(init, out_shardings=shardings)(key), shardings
    flat_old, flat_new = (
        flatten(m["config"]) | {"data.fingerprint": m["data_fingerprint"]}
        for m in (checkpointer.meta(step), meta)
    )
    allow = [key.strip() for key in run.config.resume.allow.split(",")]
    check_resume(flat_old, flat_new, FREE, allow)
    restored = checkpointer.restore(step, vars(shapes), vars(shardings))
    log.info("continuing from step %d", step)
    return TrainState(**restored), shardings


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
        "learning rate %.4g = base_lr %.4g * batch_size %d / 256, after %g steps of warm-up",
        peak,
        config.optim.base_lr,
        config.batch_size,
        duration.warmup_steps,
    )
    if run.knn is None:
        log.info("k-NN is off: it needs labels and an evaluation split (data.eval_split)")


def _features(run: Run, params: Any) -> FeatureFn:
    function = jax.jit(run.task.features)
    return lambda images: function(params, images)


def _pictures(run: Run) -> Pictures:
    """Evaluation images with masks that stay the same over the run."""
    source = Subset(run.eval_source or run.train_source, run.config.eval.pictures)
    transform = recipe.make_eval_transform(run.config)
    batch = next(iter(ordered_batches(source, transform, len(source))))
    mask = run.task.draw_mask(jax.random.key(0), len(source))
    return Pictures(run.task, batch["image"], mask, run.config.eval.stats)


def _draw_picture(
    run: Run, run_log: RunLog, pictures: Pictures, step: int, state: TrainState
) -> Path:
    picture = pictures.run(state.params)
    path = run.workdir / "pictures" / f"step_{step:07d}.png"
    save_png(path, picture)
    run_log.image(step, "reconstruction", picture)
    return path


def _evaluation_hooks(run: Run, run_log: RunLog, pictures: Pictures) -> list[Hook]:
    """What is evaluated while training goes on."""
    hooks = []
    every = run.duration.steps(run.config.eval.knn_every_epochs)
    if run.knn and every:
        knn = run.knn

        def evaluate_knn(step: int, state: TrainState) -> None:
            found = knn.run({"knn_top1": _features(run, state.params)})
            run_log.scalars(step, found)
            log.info("step %d: k-NN top-1 %.3f", step, found["knn_top1"])

        hooks.append(Hook(every, evaluate_knn))
    every = run.duration.steps(run.config.eval.pictures_every_epochs)
    if every:
        hooks.append(Hook(every, partial(_draw_picture, run, run_log, pictures)))
    return hooks


def _finish(run: Run, run_log: RunLog, pictures: Pictures, state: TrainState) -> None:
    """The last evaluation, summary.json, and its table for people."""
    step = int(state.step)
    path = _draw_picture(run, run_log, pictures, step, state)
    found = _final_knn(run, state) if run.knn else {}
    if found:
        run_log.scalars(step, found)
    rates = [row["images_per_second"] for row in run_log.history if "images_per_second" in row]
    losses = [row["loss"] for row in run_log.history if "loss" in row]
    summary = found | {
        "final_loss": losses[-1] if losses else None,
        "images_per_second": float(np.median(rates)) if rates else None,
        "steps": step,
        "pictures": str(path),
    }
    write_json(run.workdir / "summary.json", summary)
    rows = {
        "k-NN top-1, this encoder": found.get("knn_top1"),
        f"k-NN top-1, random encoder (mean of {RANDOM_ENCODERS})": found.get(
            "knn_top1_random_init"
        ),
        "k-NN top-1, raw pixels": found.get("knn_top1_pixels"),
        "loss": summary["final_loss"],
        "images per second": summary["images_per_second"],
        "pictures": str(path),
        "numbers": str(run.workdir / "summary.json"),
    }
    print_table(f"After {step} steps", {name: value for name, value in rows.items() if value})


def _final_knn(run: Run, state: TrainState) -> dict[str, float]:
    """k-NN accuracies of the encoder and, where asked for, of the baselines by the same call."""
    assert run.knn is not None
    features = {"knn_top1": _features(run, state.params)}
    if run.config.eval.knn_baselines:
        features["knn_top1_pixels"] = lambda images: (
            images.reshape(len(images), -1) / np.float32(255)
        )
        for number in range(RANDOM_ENCODERS):
            key = jax.random.fold_in(_keys(run.config)[0], 1 + number)
            features[f"random_{number}"] = _features(run, jax.jit(run.task.init)(key))
    found = run.knn.run(features)
    random = [found.pop(f"random_{i}") for i in range(RANDOM_ENCODERS) if f"random_{i}" in found]
    return found | ({"knn_top1_random_init": float(np.mean(random))} if random else {})
