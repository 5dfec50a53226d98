"""The state that a run starts from: its newest checkpoint, a warm start, or a random one."""

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.convert.model_info import ConvertError, to_variables
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.distributed.checksums import checksums
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState, init_state
from mae_jax.train import Config, build_model, warm_start
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax.run")

PROVENANCE = "init.json"  # in the workdir: what a warm start took from where
# Keys (or groups, ending in ".") that may differ when a run is continued: they change how the
# computation is laid out, watched and stored, but not what it computes.
RESUMABLE_KEYS = (
    "init.",
    "model.attention",
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
    "health.",
    "checkpoint.",
    "resume.",
    "mesh.",
)
# Keys whose change makes arrays of other shapes, which no checkpoint can fill.
SHAPE_KEYS = (
    "model.width",
    "model.depth",
    "model.patch",
    "model.channels",
    "model.mlp_ratio",
    "model.decoder_width",
    "model.decoder_depth",
)
# Keys that runs of earlier versions did not have, and what they would have been there.
DEFAULTS_OF_NEW_KEYS = {"decoder.predict_ratio": 1.0}


class ConfigError(UserError):
    """The config cannot be run; the message names the key and says what to do."""


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str], allow: Sequence[str]
) -> None:
    """CheckpointError, by key, unless a run with config `new` may continue one with `old`.

    Args:
      old, new: flat configs, "data.fingerprint" included.
      free: keys, or beginnings of keys that end in ".", whose change is only logged.
      allow: keys that the user has allowed to change.
    """
    if unknown := [key for key in allow if key and key not in {*old, *new}]:
        raise CheckpointError(f"resume.allow={unknown[0]}: there is no such key")
    refused = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, DEFAULTS_OF_NEW_KEYS.get(key)), new.get(key)
        if before == after or key == "resume.allow":
            continue
        change = f"{key}: {before} -> {after}"
        if key in allow or any(key == f or (f.endswith(".") and key.startswith(f)) for f in free):
            log.info("changed since the checkpoint: %s", change)
        else:
            refused.append((key, change))
    if refused:
        keys = [key for key, _ in refused]
        shaped = [key for key in keys if key in SHAPE_KEYS]
        way = f", or continue it with --config.resume.allow={','.join(keys)}"
        if shaped:
            way = f": its arrays are of another shape, by {', '.join(shaped)}"
        raise CheckpointError(
            "the workdir holds a run with another config:\n  "
            + "\n  ".join(change for _, change in refused)
            + f"\nUse another --workdir{way}"
        )


def split_rng(config: Config) -> tuple[jax.Array, jax.Array]:
    """One key for the first parameters, one for what the steps draw."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_key, step_key


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes of a run's state, and how it lies on the devices."""

    shapes: TrainState
    shardings: TrainState


def make_state_layout(
    config: Config,
    task: Pretrain | Classify,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> StateLayout:
    """Before there is a state.

    Raises:
      ValueError: mesh.fsdp would leave too much of it whole on every device.
    """
    limits = config.mesh
    if limits.min_split_bytes < 1 or not 0 <= limits.max_whole <= 1:
        raise ValueError(
            f"mesh.min_split_bytes={limits.min_split_bytes} must be at least 1, and "
            f"mesh.max_whole={limits.max_whole} within 0 to 1"
        )
    shapes = jax.eval_shape(_make_init(config, task, tx), split_rng(config)[0])
    shardings = sharding.state_shardings(shapes, mesh, limits.min_split_bytes)
    sharding.check_split(shapes, shardings, mesh, limits.max_whole)
    return StateLayout(shapes, shardings)


def _make_init(
    config: Config, task: Pretrain | Classify, tx: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
    return lambda key: init_state(task, tx, key, with_ema=config.optim.ema is not None)


def restore_or_init(
    config: Config,
    task: Pretrain | Classify,
    tx: optax.GradientTransformation,
    layout: StateLayout,
    checkpointer: Checkpointer,
    meta: dict[str, Any],
) -> TrainState:
    """The state to train from: of the newest checkpoint, else a first one.

    Raises:
      ConfigError, CheckpointError: init.path does not fit, or is missing where it is needed; or
        the workdir holds another run.
    """

    def accept(old_meta: dict[str, Any]) -> None:
        old, new = (
            flatten(m["config"], sep=".") | {"data.fingerprint": m["data_fingerprint"]}
            for m in (old_meta, meta)
        )
        allow = [key.strip() for key in config.resume.allow.split(",")]
        check_resume(old, new, RESUMABLE_KEYS, allow)

    found = checkpointer.restore_newest(vars(layout.shapes), vars(layout.shardings), accept)
    if found:
        log.info("continuing from step %d", found[0])
        return TrainState(**found[1])
    path = config.init.path
    with processes.raise_together():
        if path is None and config.task == "classify":
            raise ConfigError(
                "init.path is not set, so the encoder would be random: "
                "--config.init.path=CHECKPOINT names pretrained weights; --config.init.path=random "
                "says that random ones are meant"
            )
    # Each device makes only the part of the state that it holds.
    init = jax.jit(_make_init(config, task, tx), out_shardings=layout.shardings)
    state = init(split_rng(config)[0])
    if path not in (None, "random"):
        return _init_from_checkpoint(
            config, task, state, layout, meta, checkpointer.directory.parent
        )
    if config.task == "classify":
        log.warning("init.path=random: the encoder starts from random weights")
    _write_provenance(checkpointer.directory.parent, {"path": "random"})
    return state


def _init_from_checkpoint(
    config: Config,
    task: Pretrain | Classify,
    state: TrainState,
    layout: StateLayout,
    meta: dict[str, Any],
    workdir: Path,
) -> TrainState:
    """The first state with the parameters that init.path has for it."""
    path, arrays = config.init.path, {**state.params, **state.batch_stats}
    with processes.raise_together():
        try:
            start = build_model.load_init_weights(config, task, arrays, tuple(meta["classes"]))
        except ConvertError as error:
            raise ConfigError(f"init.path: {error}") from error
    read = {n: x for n, x in flatten(start.params).items() if isinstance(x, np.ndarray)}
    try:
        processes.assert_equal_across_processes(
            {f"checkpoint under init.path={path}": str(checksums(read))}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    warm_start.log_init_report(path, start)
    names = {name: vars(start)[name] for name in ("loaded", "fresh", "unused")}
    _write_provenance(workdir, {"path": path, **names})
    found = to_variables(start.params)
    params = sharding.device_put_tree(found["params"], layout.shardings.params)
    stats = sharding.device_put_tree(found["batch_stats"], layout.shardings.batch_stats)
    # A copy, since a step donates its state and may not be given the same buffer twice.
    ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None
    return dataclasses.replace(state, params=params, batch_stats=stats, ema=ema)


def _write_provenance(workdir: Path, found: dict[str, Any]) -> None:
    if processes.is_main():
        write_json(workdir / PROVENANCE, found)


def init_provenance(workdir: Path) -> dict[str, Any]:
    """For the summary: which parameters a run began with."""
    try:
        return {"init": json.loads((workdir / PROVENANCE).read_text())}
    except (OSError, ValueError):
        return {"init": {"path": "random"}}
