"""The parts of a run, made from its config, and what they say of themselves."""

import dataclasses
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from mae_jax.data.loader import Loader
from mae_jax.data.sources import Source
from mae_jax.distributed import sharding
from mae_jax.models import attention_autotune
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train import Config, build_data, build_model, judges, schedule
from mae_jax.train.init_state import ConfigError, StateLayout, make_state_layout
from mae_jax.train.schedule import RunLength

log = logging.getLogger("mae_jax.run")


@dataclass(frozen=True)
class RunSetup:
    """The parts of a run, all checked before anything is written or trained."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Pretrain | Classify
    train_source: Source
    fingerprint: str  # of the training data; of millions of files it takes a while
    eval_source: Source | None
    loader: Loader | None  # None where nothing is trained
    on_device: bool  # whether crops are resized there
    duration: RunLength
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    layout: StateLayout


def build(config: Config, workdir: Path) -> RunSetup:
    """Reads and checks the config, and opens the data.

    Raises:
      ConfigError, DataError: a value, a file or a folder is not as it should be.
    """
    try:
        judges.check_evaluation(config)
        build_data.check_seeds(config)
        _check_health(config)
        mesh = sharding.make_mesh(config.mesh.fsdp)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
        index_dir = Path(os.path.abspath(workdir)).parent / ".indices"
        train_source = build_data.make_train_source(config, index_dir)
        eval_source = build_data.make_eval_source(config, train_source.classes, index_dir)
        task = build_model.make_task(config, mesh, train_source.classes)
        classifies = isinstance(task, Classify)
        duration = schedule.make_run_length(config, len(train_source))
        learning_rate = schedule.make_learning_rate(config, duration)
        first = config.log.profile_from
        if first is not None and first > duration.total_steps:
            raise ValueError(
                f"log.profile_from={first} is beyond the {duration.total_steps} steps of the run"
            )
        blocks = task.train_last_blocks if classifies else None
        loader = None
        kind = build_data.pixel_dtype(config, train_source)
        if eval_source:
            build_data.pixel_dtype(config, eval_source)
        if duration.total_steps:
            classes = task.model.num_classes if classifies else None
            loader = build_data.make_loader(config, train_source, classes, kind)
        tx = optax.identity()
        if duration.total_steps:
            tx = schedule.make_optimizer(config, learning_rate, blocks)
        return RunSetup(
            config=config,
            workdir=workdir,
            mesh=mesh,
            task=task,
            train_source=train_source,
            fingerprint=train_source.fingerprint(),
            eval_source=eval_source,
            loader=loader,
            on_device=build_data.resizes_on_device(config, kind),
            duration=duration,
            learning_rate=learning_rate,
            tx=tx,
            layout=make_state_layout(config, task, tx, mesh),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_attention(run: RunSetup) -> RunSetup:
    """The run with the implementations of attention that suit its devices.

    All processes have to call this together.

    Raises:
      ConfigError: model.attention does not work here.
    """
    config, shapes = run.config, run.task.attention_shapes
    try:
        attend = attention_autotune.select_implementation(
            config.model.attention, shapes, jnp.dtype(config.model.dtype)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    task = build_model.make_task(config, run.mesh, run.train_source.classes, attend)
    return dataclasses.replace(run, task=task)


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
        if not value >= least:  # nan is none of them
            raise ValueError(f"{name}={value} must be at least {least}")


def warn_low_disk_space(run: RunSetup) -> None:
    """Says so where the checkpoints that are kept, and one more, will not fit onto the disk."""
    leaves = jax.tree.leaves(run.layout.shapes)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    there = len(list((run.workdir / "checkpoints").glob("[0-9]*")))
    needed = state * (run.config.checkpoint.max_to_keep + 1 - there)
    free = shutil.disk_usage(run.workdir).free
    if needed > free:
        log.warning(
            "checkpoints will take another %.1f GB, %.1f GB each, and %.1f GB are free in %s: the "
            "run ends at the first that does not fit",
            needed / 1e9,
            state / 1e9,
            free / 1e9,
            run.workdir,
        )


def log_run_summary(run: RunSetup, start_step: int) -> None:
    config, duration, task = run.config, run.duration, run.task
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    listed = ", ".join(f"{_count(size)} in {part}" for part, size in sizes.items())
    if isinstance(task, Pretrain):
        listed += f"; {task.num_kept} of {task.num_patches} patches are visible"
        if task.num_predicted < task.num_masked:
            listed += f"; {task.num_predicted} of {task.num_masked} masked ones are predicted"
    elif task.train_last_blocks is not None:
        last = f" and the last {task.train_last_blocks} blocks" if task.train_last_blocks else ""
        listed += f"; trained: the head{last}"
    log.info("parameters: %s", listed)
    if config.mesh.fsdp > 1:
        split, whole = sharding.bytes_per_device(run.layout.shapes, run.layout.shardings)
        text = "of parameters and optimizer each device holds %.1f MB of split and %.1f MB of "
        text += "whole arrays"
        log.info(text, split / 1e6, whole / 1e6)
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
    if config.eval.knn_every_epochs >= 0 and not judges.features_enabled(
        config, run.train_source, run.eval_source
    ):
        log.info(
            "k-NN is off: it needs labels and an evaluation split, and %s",
            "there are no labels"
            if run.eval_source
            else f"data.eval_split={config.data.eval_split!r} is not there",
        )


def _count(size: int) -> str:
    return f"{size / 1e6:.1f} M" if size >= 1e5 else f"{size:,}"
