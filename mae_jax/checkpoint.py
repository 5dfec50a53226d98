"""Checkpoints with orbax, what they remember about their run, and who may write to a workdir."""

import fcntl
import itertools
import logging
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax.trees import differences

log = logging.getLogger("mae_jax")


class CheckpointError(Exception):
    """A checkpoint or a workdir cannot be used; the message says why and what to do."""


class Checkpointer:
    """Saves and restores states in `directory`, one numbered folder per step.

    The parameters are an item of their own, "params", so that other programs can read them alone.
    "train" holds the rest of the state, "meta" what the run wants to know on resuming, and the
    digests by which a damaged checkpoint is recognised: orbax itself would restore flipped bytes.
    Saving goes on in the background; a step's folder appears only when it is complete.
    """

    def __init__(self, directory: Path, max_to_keep: int):
        self.directory = directory
        self._max_to_keep = max_to_keep
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._max_to_keep, cleanup_tmp_directories=True
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(
            self.directory.absolute(), options=options, item_handlers=handlers
        )

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Saves {"params": ..., other items of the state}; does nothing if the step is there."""
        if step in self._manager.all_steps():
            return
        train = {name: item for name, item in state.items() if name != "params"}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state["params"]),
                train=ocp.args.StandardSave(train),
                meta=ocp.args.JsonSave({**meta, "digests": digests(state)}),
            ),
        )

    def restore_newest(
        self,
        shapes: Mapping[str, Any],
        shardings: Mapping[str, Any],
        accept: Callable[[dict[str, Any]], None],
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest step that reads back as it was written, and its state; None if there is none.

        Damaged steps are renamed to "<step>.damaged" and named in the log. `accept` is given the
        meta of a step, and raises where the run must not continue from it.

        Raises:
          CheckpointError: a step does not fit the model, or all steps are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                meta, stored = self._read_meta(step)
            except Exception as error:  # orbax has no common class for what can go wrong
                self._set_aside(step, error)
                continue
            accept(meta)
            self._check_fits(step, shapes["params"], stored)
            try:
                return step, self._read_state(step, shapes, shardings, meta["digests"])
            except Exception as error:
                self._set_aside(step, error)
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (renamed to *.damaged). To start "
                "anew, use another --workdir"
            )
        return None

    def _read_meta(self, step: int) -> tuple[dict[str, Any], Mapping[str, Any]]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]
        stored = self._manager.item_metadata(step)["params"]
        if stored is None or "digests" not in meta:
            raise ValueError("it does not say what it holds")
        return meta, stored.tree

    def _check_fits(self, step: int, wanted: Mapping, stored: Mapping) -> None:
        wrong = differences(wanted, stored)
        if wrong:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} does not fit the model:\n  "
                + "\n  ".join(wrong)
            )

    def _read_state(
        self, step: int, shapes: Mapping, shardings: Mapping, expected: Mapping[str, int]
    ) -> dict[str, Any]:
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(shapes),
            dict(shardings),
        )
        params = abstract.pop("params")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(params), train=ocp.args.StandardRestore(abstract)
            ),
        )
        state = {"params": restored["params"], **restored["train"]}
        _check_digests(state, expected)
        return state

    def _set_aside(self, step: int, error: Exception) -> None:
        """Renames a damaged step; left in place it would count as the newest for ever."""
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
        folder = self.directory / str(step)
        kept = next(
            path
            for number in itertools.count()
            if not (path := folder.with_name(f"{step}.damaged{number or ''}")).exists()
        )
        log.warning("checkpoint %s is damaged and renamed to %s: %s", folder, kept.name, reason)
        self._manager.close()
        folder.rename(kept)
        self._manager = self._open()

    def wait(self) -> None:
        """Waits for saves in the background, and raises what went wrong in them."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases everything."""
        self.wait()
        self._manager.close()


def read_run(
    directory: Path, step: int | None = None, items: Sequence[str] = ("params",)
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """A step of a run, items of its state as numpy arrays, and its meta; changes nothing.

    Args:
      step: None takes the newest that reads back as it was written.
      items: "params", "ema" for the average of the parameters, "batch_stats", which may be empty.

    Raises:
      CheckpointError: there is no such step or item, or it is damaged.
    """
    with _read_only_manager(directory) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"{directory} has no step {step}; it has {steps}")
        for number in steps if step is None else [step]:
            try:
                meta = _meta(manager, number)
                found = [_read_item(manager, number, item, meta["digests"]) for item in items]
                return number, found, meta
            except CheckpointError:
                raise
            except Exception as error:  # orbax has no common class for what can go wrong
                log.warning("checkpoint %s is damaged: %s", directory / str(number), error)
    which = "holds no checkpoint" if step is None else f"has a step {step}, but none"
    raise CheckpointError(f"{directory} {which} that can be read; its steps are {steps}")


@contextmanager
def _read_only_manager(directory: Path) -> Iterator[ocp.CheckpointManager]:
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(),
        "train": ocp.PyTreeCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
    # Read only, it leaves alone what a run may be writing there just now.
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity("error")  # it would warn that it is read only
    try:
        with ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        ) as manager:
            yield manager
    finally:
        absl.logging.set_verbosity(verbosity)


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _read_item(
    manager: ocp.CheckpointManager, step: int, item: str, expected: Mapping[str, int]
) -> dict[str, Any]:
    metadata = manager.item_metadata(step)
    if item == "params":
        group, stored = "params", metadata["params"].tree
    else:
        group, stored = "train", {item: metadata["train"].tree.get(item)}
    if group == "train" and not stored[item]:
        if item == "batch_stats":
            return {}
        raise CheckpointError(
            f"step {step} in {manager.directory} keeps no {item}: read it without"
        )
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(stored))
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    arguments = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
    restored = manager.restore(step, args=ocp.args.Composite(**{group: arguments}))[group]
    state = {"params": restored} if item == "params" else restored
    _check_digests(state, expected)
    return state[item]


def _check_digests(state: Mapping[str, Any], expected: Mapping[str, int]) -> None:
    """ValueError unless the arrays of a state are those that were saved."""
    changed = [name for name, crc in digests(state).items() if crc != expected.get(name)]
    if changed:
        raise ValueError(f"{len(changed)} arrays are not what was saved, {changed[0]} for one")


def digests(state: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of every array of a state, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(state))
    return {jax.tree_util.keystr(path): _crc32(np.asarray(leaf)) for path, leaf in leaves}


def _crc32(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def check_resume(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str], allow: Sequence[str]
) -> None:
    """CheckpointError, by key, unless a run with config `new` may continue one with `old`.

    Args:
      old, new: flat configs, "data.fingerprint" included.
      free: keys, or beginnings of keys that end in ".", whose change is only logged.
      allow: keys that the user has allowed to change.
    """
    refused = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        change = f"{key}: {before} -> {after}"
        if key in allow or any(key == f or (f.endswith(".") and key.startswith(f)) for f in free):
            log.info("changed since the checkpoint: %s", change)
        else:
            refused.append((key, change))
    if refused:
        keys = ",".join(key for key, _ in refused)
        raise CheckpointError(
            "the workdir holds a run with another config:\n  "
            + "\n  ".join(change for _, change in refused)
            + f"\nUse another --workdir, or continue it with --config.resume.allow={keys}"
        )


@contextmanager
def locked_workdir(workdir: Path) -> Iterator[None]:
    """Creates a workdir and holds it for this process alone; CheckpointError if that fails."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"cannot write to the workdir {workdir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise CheckpointError(
                f"the workdir {workdir} is in use by {file.read().strip() or 'another process'}"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
