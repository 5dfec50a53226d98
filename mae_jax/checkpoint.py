"""Checkpoints with orbax, what they remember about their run, and who may write to a workdir."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mae_jax.trees import differences

log = logging.getLogger("mae_jax")


class CheckpointError(Exception):
    """A checkpoint or a workdir cannot be used; the message says why and what to do."""


class Checkpointer:
    """Saves and restores states in `directory`, one numbered folder per step.

    The parameters are an item of their own, "params", so that other programs can read them alone.
    "train" holds the rest of the state, "meta" the run's config and data fingerprint as JSON.
    Saving goes on in the background; a step's folder appears only when it is complete.
    """

    def __init__(self, directory: Path, max_to_keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "train": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        )
        self.directory = directory

    def latest_step(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

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
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def restore(self, step: int, shapes: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict:
        """The state of a step, laid out as `shardings`; CheckpointError names what does not fit."""
        stored = self._manager.item_metadata(step)["params"]
        wrong = differences(shapes["params"], stored)
        if wrong:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} does not fit the model:\n  "
                + "\n  ".join(wrong)
            )
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
        return {"params": restored["params"], **restored["train"]}

    def wait(self) -> None:
        """Waits for saves in the background, and raises what went wrong in them."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases everything."""
        self.wait()
        self._manager.close()


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
