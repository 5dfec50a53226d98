"""The state that a run starts from: its newest checkpoint, a warm start, or a random one."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mae_jax import sharding, warm_start
from mae_jax.checkpoint import Checkpointer, check_resume, flatten
from mae_jax.convert.info import ConvertError, variables
from mae_jax.metrics import write_json
from mae_jax.recipe import Config, tasks
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import TrainState, init_state

log = logging.getLogger("mae_jax")

ORIGIN = "init.json"  # in the workdir: what a warm start took from where
# Keys (or groups, ending in ".") that may differ when a run is continued: they change how the
# computation is laid out, watched and stored, but not what it computes.
FREE = (
    "init.",
    "model.remat",
    "model.scan_unroll",
    "data.path",
    "data.workers",
    "data.threads",
    "data.resize_on",
    "data.canvas",
    "data.in_memory",
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


def run_keys(config: Config) -> tuple[jax.Array, jax.Array]:
    """One key for the first parameters, one for what the steps draw."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_key, step_key


def starting_state(
    config: Config,
    task: Pretrain | Classify,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    checkpointer: Checkpointer,
    meta: dict[str, Any],
) -> tuple[TrainState, TrainState]:
    """The state to train from, and its shardings: of the newest checkpoint, else a first one.

    Raises:
      ConfigError, CheckpointError: init.path does not fit, or is missing where it is needed; or
        the workdir holds another run.
    """

    def init(key: jax.Array) -> TrainState:
        return init_state(task, tx, key, with_ema=config.optim.ema is not None)

    key, _ = run_keys(config)
    shapes = jax.eval_shape(init, key)
    shardings = sharding.state_shardings(shapes, mesh)

    def accept(old_meta: dict[str, Any]) -> None:
        old, new = (
            flatten(m["config"]) | {"data.fingerprint": m["data_fingerprint"]}
            for m in (old_meta, meta)
        )
        allow = [key.strip() for key in config.resume.allow.split(",")]
        check_resume(old, new, FREE, allow)

    found = checkpointer.restore_newest(vars(shapes), vars(shardings), accept)
    if found:
        log.info("continuing from step %d", found[0])
        return TrainState(**found[1]), shardings
    path = config.init.path
    if path is None and config.task == "classify":
        raise ConfigError(
            "init.path is not set, so the encoder would be random: "
            "--config.init.path=CHECKPOINT names pretrained weights; --config.init.path=random "
            "says that random ones are meant"
        )
    # Each device makes only the part of the state that it holds.
    state = jax.jit(init, out_shardings=shardings)(key)
    if path not in (None, "random"):
        return _warm(config, task, state, shardings, meta, checkpointer.directory.parent), shardings
    if config.task == "classify":
        log.warning("init.path=random: the encoder starts from random weights")
    write_json(checkpointer.directory.parent / ORIGIN, {"path": "random"})
    return state, shardings


def _warm(
    config: Config,
    task: Pretrain | Classify,
    state: TrainState,
    shardings: TrainState,
    meta: dict[str, Any],
    workdir: Path,
) -> TrainState:
    """The first state with the parameters that init.path has for it."""
    path, arrays = config.init.path, {**state.params, **state.batch_stats}
    try:
        start = tasks.make_warm_start(config, task, arrays, tuple(meta["classes"]))
    except ConvertError as error:
        raise ConfigError(f"init.path: {error}") from error
    warm_start.report(path, start)
    names = {name: vars(start)[name] for name in ("loaded", "fresh", "unused")}
    write_json(workdir / ORIGIN, {"path": path, **names})
    found = variables(start.params)
    params, stats = (
        jax.tree.map(jax.device_put, tree, layout)
        for tree, layout in (
            (found["params"], shardings.params),
            (found["batch_stats"], shardings.batch_stats),
        )
    )
    # A copy, since a step donates its state and may not be given the same buffer twice.
    ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None
    return dataclasses.replace(state, params=params, batch_stats=stats, ema=ema)


def origin(workdir: Path) -> dict[str, Any]:
    """For the summary: which parameters a run began with."""
    try:
        return {"init": json.loads((workdir / ORIGIN).read_text())}
    except (OSError, json.JSONDecodeError):
        return {"init": {"path": "random"}}
