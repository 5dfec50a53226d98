"""Reading checkpoints: what is believed of them only when it reads back as it was written."""

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax.distributed.checksums import checksums
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax.run")

FORMAT = 2  # of what "meta" holds


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message says why and what to do."""


class CorruptCheckpointError(Exception):
    """A step does not read back as it was written."""


def load_run_checkpoint(
    directory: Path, step: int | None = None, items: Sequence[str] = ("params",)
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """A step of a run, items of its state as numpy arrays, and its meta; changes nothing.

    Args:
      step: None takes the newest that reads back as it was written.
      items: "params", "ema" for the average of the parameters, "batch_stats", which may be empty.

    Raises:
      CheckpointError: there is no such step or item, or it is damaged.
    """
    with open_reader(directory, ocp.PyTreeCheckpointHandler) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"{directory} has no step {step}; it has {steps}")
        for number in steps if step is None else [step]:
            try:
                with wrap_read_errors():
                    meta = read_meta(manager, number)
                    found = [_read_item(manager, number, item, meta["digests"]) for item in items]
                return number, found, meta
            except CorruptCheckpointError as error:
                log.warning("checkpoint %s is damaged: %s", directory / str(number), error)
    which = "holds no checkpoint" if step is None else f"has a step {step}, but none"
    raise CheckpointError(f"{directory} {which} that can be read; its steps are {steps}")


def make_handlers(arrays: Callable[..., Any], **options: Any) -> dict[str, Any]:
    return {
        "params": arrays(**options),
        "train": arrays(**options),
        "meta": ocp.JsonCheckpointHandler(**options),
    }


@contextmanager
def open_reader(directory: Path, arrays: Callable[..., Any]) -> Iterator[ocp.CheckpointManager]:
    """A manager that changes nothing, and reads in this process without waiting for others.

    So a step that only some of them can read stops nobody.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, multiprocessing_options=alone
    )
    handlers = make_handlers(arrays, multiprocessing_options=alone)
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity("error")  # it would warn that it is read only
    try:
        with ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        ) as manager:
            yield manager
    finally:
        absl.logging.set_verbosity(verbosity)


@contextmanager
def wrap_read_errors() -> Iterator[None]:
    """Makes of whatever reading raises a DamageError, unless it may be over the next time."""
    try:
        yield
    except (CheckpointError, CorruptCheckpointError):
        raise
    except Exception as error:  # orbax has no common class for what can go wrong
        if _is_transient(error):
            raise CheckpointError(
                f"a checkpoint cannot be read just now ({summarize_error(error)}); nothing was changed"
            ) from error
        raise CorruptCheckpointError(summarize_error(error)) from error


def _is_transient(error: Exception) -> bool:
    """Whether an error is of the machine, such as too little memory, and not of what is read."""
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def summarize_error(error: BaseException) -> str:
    """What an error says, on one line; the first words of tensorstore's are the least telling."""
    text = str(error).strip()
    for known in ("No space left on device", "File too large", "Read-only file system"):
        if known in text:
            return known
    return text.splitlines()[0][:200] if text else repr(error)


def meta_crc(meta: Mapping[str, Any]) -> int:
    """Of what a run says of a step, in the form in which it is read back."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    crc, known = meta.pop("crc", None), "format" in meta  # the first format had neither
    if known and crc != meta_crc(meta):
        raise ValueError("what it says of its run is not what was written")
    if meta.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"checkpoint {manager.directory / str(step)} was written by another version of "
            f"mae_jax, as format {meta.get('format', 1)}; this version reads {FORMAT}"
        )
    return meta


def _read_item(
    manager: ocp.CheckpointManager, step: int, item: str, expected: Mapping[str, str]
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
    check_digests(state, expected)
    return state[item]


def check_digests(state: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """DamageError unless the arrays of a state are those that were saved."""
    changed = [name for name, digest in checksums(state).items() if digest != expected.get(name)]
    if changed:
        raise CorruptCheckpointError(
            f"{len(changed)} arrays are not what was saved, {changed[0]} for one"
        )
