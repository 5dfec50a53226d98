"""Build and validate the parts of a run from its config."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax.data.loader import Loader
from mae_jax.data.sources import Source
from mae_jax.distributed import processes, sharding
from mae_jax.models import attention_selection
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.tasks.train_step import jit_step, make_train_step
from mae_jax.train import build_data, build_model, build_sources, loggers
from mae_jax.train.build_model import RunLength
from mae_jax.train.config import Config
from mae_jax.train.config_schema import as_json
from mae_jax.train.init_state import StateLayout, make_state_layout, split_rng


@dataclass(frozen=True)
class RunSetup:
    """The parts of a run, all validated before anything is written or trained."""

    config: Config
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Pretrain | SupervisedTask
    classes: tuple[str, ...]  # names of the classes of images or pixels
    train_source: Source
    fingerprint: str  # of the training data; takes a while for millions of files
    eval_source: Source | None
    loader: Loader | None  # None if nothing is trained
    pixel_dtype: str  # of the images: "uint8", "uint16" or "float32"
    resize_on_device: bool
    length: RunLength
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    layout: StateLayout

    @property
    def meta(self) -> dict[str, Any]:
        """Metadata of the run's checkpoints, which a run that resumes them must match."""
        return {
            "config": as_json(self.config),
            "data_fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "pixel_dtype": self.pixel_dtype,
            "jax": jax.__version__,
        }


def build(config: Config, workdir: Path) -> RunSetup:
    """Open the data, and build model, objective and optimizer.

    Raises:
      UserError: a config value, a file or a folder is invalid.
    """
    loggers.import_packages(config.log.to)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch(config.batch_size, config.accumulate, mesh)
    index_dir = Path(os.path.abspath(workdir)).parent / ".indices"
    train_source = build_sources.make_train_source(config, index_dir)
    eval_source = build_sources.make_eval_source(config, train_source.classes, index_dir)
    dtype = build_data.pixel_dtype(config, train_source)
    if eval_source:
        build_data.pixel_dtype(config, eval_source)
    classes = build_sources.class_names(config, train_source)
    task = build_model.make_task(config, mesh, classes)
    length = build_model.make_run_length(config, len(train_source))
    learning_rate = build_model.make_learning_rate(config, length)
    loader, tx = None, optax.identity()
    if length.total_steps:
        supervised = task if isinstance(task, SupervisedTask) else None
        num_classes = supervised.model.num_classes if supervised else None
        loader = build_data.make_loader(config, train_source, num_classes, dtype)
        blocks = supervised.train_last_blocks if supervised else None
        tx = build_model.make_optimizer(config, learning_rate, blocks)
    return RunSetup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        task=task,
        classes=classes,
        train_source=train_source,
        fingerprint=train_source.fingerprint(),
        eval_source=eval_source,
        loader=loader,
        pixel_dtype=dtype.name,
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
    attention = attention_selection.select_implementation(
        config.model.attention, setup.task.attention_shapes, jnp.dtype(config.model.dtype)
    )
    task = build_model.make_task(config, setup.mesh, setup.classes, attention)
    return dataclasses.replace(setup, task=task)


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
