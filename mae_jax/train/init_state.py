"""The state that a run starts from: its latest checkpoint, a warm start, or random parameters."""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.convert.locate import locate
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.networks import to_variables
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.distributed.checksums import checksums
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.tasks.train_step import TrainState, init_state
from mae_jax.train.config import Config
from mae_jax.train.resume import allowed_keys, check_compatible
from mae_jax.train.warm_start import load_init_weights, log_init_report
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax.run")

PROVENANCE = "init.json"  # in the workdir: which arrays a warm start loaded, and from where


def split_rng(seed: int) -> tuple[jax.Array, jax.Array]:
    """Return the PRNG keys of the first parameters and of the training steps."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    return init_key, step_key


@dataclass(frozen=True)
class StateLayout:
    """Shapes and shardings of the train state, and the jitted function of a key that makes one."""

    init: Callable[[jax.Array], TrainState]
    shapes: TrainState
    shardings: TrainState


def make_state_layout(
    config: Config,
    task: Pretrain | SupervisedTask,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> StateLayout:
    """Return shapes and shardings of the train state, without allocating it.

    Raises:
      UserError: mesh.fsdp would leave too much of it replicated.
    """
    limits = config.mesh
    with_ema = config.optim.ema is not None
    init = jax.jit(lambda key: init_state(task, tx, key, with_ema=with_ema))
    shapes = init.eval_shape(split_rng(config.seed)[0])
    shardings = sharding.state_shardings(shapes, mesh, limits.min_split_bytes)
    sharding.check_sharded(shapes, shardings, mesh, limits.max_whole)
    return StateLayout(init, shapes, shardings)


def restore_or_init(
    config: Config,
    task: Pretrain | SupervisedTask,
    layout: StateLayout,
    checkpointer: Checkpointer,
    meta: dict[str, Any],
) -> TrainState:
    """Return the state to train from: the latest checkpoint's, else a first one.

    Args:
      meta: metadata of the run, which a checkpoint to resume must match.

    Raises:
      UserError: init.path does not fit, or is missing where it is needed; or the workdir holds
        another run.
    """
    restored = checkpointer.restore_latest(
        vars(layout.shapes),
        vars(layout.shardings),
        lambda old_meta: check_compatible(old_meta, meta, allowed_keys(config)),
    )
    if restored:
        log.info("resuming from step %d", restored[0])
        return TrainState(**restored[1])
    path = config.init.path
    with processes.raise_together():
        if path is None and config.task != "pretrain":
            raise UserError(
                "init.path is not set, so the encoder would be random: "
                "--config.init.path=CHECKPOINT loads pretrained weights; --config.init.path=random "
                "starts from random ones"
            )
    # Each device initializes only its own part of the state.
    state = jax.jit(layout.init, out_shardings=layout.shardings)(split_rng(config.seed)[0])
    if path not in (None, "random"):
        return _init_from_checkpoint(config, task, state, layout, meta, checkpointer.directory)
    if config.task != "pretrain":
        log.warning("init.path=random: the encoder starts from random weights")
    _write_provenance(checkpointer.directory.parent, {"path": "random"})
    return state


def _init_from_checkpoint(
    config: Config,
    task: Pretrain | SupervisedTask,
    state: TrainState,
    layout: StateLayout,
    meta: dict[str, Any],
    checkpoints: Path,
) -> TrainState:
    """Return a first state with the parameters of init.path (warm start)."""
    path, workdir = str(config.init.path), checkpoints.parent
    with processes.raise_together():
        try:
            source = locate(path, _recorded_revision(workdir, path))
            arrays, classes = {**state.params, **state.batch_stats}, tuple(meta["classes"])
            warm = load_init_weights(config, task, arrays, classes, str(source.path))
        except ConvertError as error:
            raise UserError(f"init.path: {error}") from error
    loaded = {n: x for n, x in flatten(warm.params).items() if isinstance(x, np.ndarray)}
    processes.assert_equal_across_processes(
        {f"checkpoint under init.path={path}": str(checksums(loaded))}
    )
    log_init_report(f"{path} at {source.revision}" if source.revision else path, warm)
    names = {"loaded": warm.loaded, "fresh": warm.missing, "unused": warm.unexpected}
    revision = {"revision": source.revision} if source.revision else {}
    _write_provenance(workdir, {"path": path, **revision, **names})
    variables = to_variables(warm.params)
    params = sharding.device_put_tree(variables["params"], layout.shardings.params)
    stats = sharding.device_put_tree(variables["batch_stats"], layout.shardings.batch_stats)
    # A copy, because a step donates its state and must not be given the same buffer twice.
    ema = jax.tree.map(jnp.copy, params) if state.ema is not None else None
    return dataclasses.replace(state, params=params, batch_stats=stats, ema=ema)


def _recorded_revision(workdir: Path, path: str) -> str:
    """Return the revision of a model of the hub from which a run, that saved nothing, started."""
    recorded = init_provenance(workdir)["init"]
    return recorded.get("revision", "") if recorded.get("path") == path else ""


def _write_provenance(workdir: Path, values: dict[str, Any]) -> None:
    if processes.is_main():
        write_json(workdir / PROVENANCE, values)


def init_provenance(workdir: Path) -> dict[str, Any]:
    """Return which parameters a run started from, for its summary."""
    try:
        return {"init": json.loads((workdir / PROVENANCE).read_text())}
    except (OSError, ValueError):
        return {"init": {"path": "random"}}
