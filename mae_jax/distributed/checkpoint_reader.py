"""Reads checkpoints and verifies their checksums, without changing anything."""

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
from mae_jax.distributed.glob_safe import glob_safe, name_folders
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax.run")

FORMAT = 2  # version of the content of "meta"


class CheckpointError(UserError):
    """A checkpoint that cannot be used: why, and what to do."""


class CorruptCheckpointError(Exception):
    """A step of a checkpoint that fails verification."""


def load_run_checkpoint(
    directory: Path, step: int | None = None, items: Sequence[str] = ("params",)
) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Return a step of a run, items of its state as numpy arrays, and its metadata; read-only.

    Args:
      step: None reads the latest step that passes verification.
      items: "params", "ema" (EMA of the parameters), "batch_stats" (may be empty).

    Raises:
      CheckpointError: the step or an item does not exist, or is corrupt.
    """
    with open_reader(directory, ocp.PyTreeCheckpointHandler) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"{directory} has no step {step}; it has {steps}")
        for candidate in steps if step is None else [step]:
            try:
                with wrap_read_errors():
                    meta = read_meta(manager, candidate)
                    trees = [_read_item(manager, candidate, i, meta["digests"]) for i in items]
                return candidate, trees, meta
            except CorruptCheckpointError as error:
                log.warning("checkpoint %s is damaged: %s", directory / str(candidate), error)
    which = "no readable checkpoint" if step is None else f"no readable step {step}"
    raise CheckpointError(f"{directory} has {which}; its steps are {steps}")


def make_handlers(arrays: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Return the orbax handlers of the items of a checkpoint; `arrays` makes those of arrays."""
    return {
        "params": arrays(**options),
        "train": arrays(**options),
        "meta": ocp.JsonCheckpointHandler(**options),
    }


@contextmanager
def open_reader(directory: Path, arrays: Callable[..., Any]) -> Iterator[ocp.CheckpointManager]:
    """Open a read-only manager of this process alone, without barriers between processes.

    So a step that only some processes can read does not block the others.
    """
    process = jax.process_index()
    single_process = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"reader_{process}",
    )
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, multiprocessing_options=single_process
    )
    handlers = make_handlers(arrays, multiprocessing_options=single_process)
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity("error")  # orbax warns about read_only
    try:
        with (
            glob_safe(directory) as path,
            ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager,
        ):
            yield manager
    finally:
        absl.logging.set_verbosity(verbosity)


@contextmanager
def wrap_read_errors() -> Iterator[None]:
    """Re-raise read errors as CorruptCheckpointError, transient ones as CheckpointError."""
    try:
        yield
    except (CheckpointError, CorruptCheckpointError):
        raise
    except Exception as error:  # orbax has no common base class
        reason = summarize_error(error)
        if _is_transient(error):
            raise CheckpointError(
                f"a checkpoint cannot be read now ({reason}); nothing was changed"
            ) from error
        raise CorruptCheckpointError(reason) from error


def _is_transient(error: Exception) -> bool:
    """Return whether an error is due to the machine (I/O, out of memory), not to the file."""
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def summarize_error(error: BaseException) -> str:
    """Return an error on one line; tensorstore puts the cause at the end of a long message."""
    text = name_folders(str(error).strip())
    for cause in ("No space left on device", "File too large", "Read-only file system"):
        if cause in text:
            return cause
    return text.splitlines()[0][:200] if text else repr(error)


def meta_crc(meta: Mapping[str, Any]) -> int:
    """Return the CRC32 of JSON-serialized metadata."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Return the metadata of a step.

    Raises:
      ValueError: its CRC32 does not match.
      CheckpointError: it has another format version.
    """
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    crc = meta.pop("crc", None)
    if "format" in meta and crc != meta_crc(meta):  # format 1 had neither key
        raise ValueError("the CRC32 of its metadata does not match")
    if meta.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"checkpoint {_folder(manager)}/{step} was written by another version of "
            f"mae_jax, in format {meta.get('format', 1)}; this version reads format {FORMAT}"
        )
    return meta


def _folder(manager: ocp.CheckpointManager) -> str:
    return name_folders(str(manager.directory))


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
        raise CheckpointError(f"step {step} in {_folder(manager)} has no {item}; read it without")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(stored))
    arguments = ocp.args.Composite(**{group: _as_numpy(shapes)})
    restored = manager.restore(step, args=arguments)[group]
    state = {"params": restored} if item == "params" else restored
    verify_checksums(state, expected)
    return state[item]


def verify_step(directory: Path, step: int, state: Mapping[str, Any]) -> None:
    """Read a step of a run back; each process reads its share of the arrays.

    Args:
      state: the arrays that were saved, or their shapes.

    Raises:
      CorruptCheckpointError: an array is missing or has another checksum.
      CheckpointError: the step cannot be read now.
    """
    count, process = jax.process_count(), jax.process_index()
    leaves, structure = jax.tree.flatten(dict(state))
    shares = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if n % count == process else ocp.PLACEHOLDER
        for n, leaf in enumerate(leaves)
    ]
    train = structure.unflatten(shares)
    params = train.pop("params")
    arguments = ocp.args.Composite(params=_as_numpy(params), train=_as_numpy(train))
    with open_reader(directory, ocp.PyTreeCheckpointHandler) as manager, wrap_read_errors():
        expected = read_meta(manager, step)["digests"]
        restored = manager.restore(step, args=arguments)
    share = jax.tree.map(
        lambda leaf: None if leaf is ocp.PLACEHOLDER else leaf,
        {"params": restored["params"], **restored["train"]},
    )
    verify_checksums(share, expected)


def _as_numpy(shapes: Any) -> ocp.args.PyTreeRestore:
    """Return the arguments that restore arrays of these shapes as numpy arrays."""
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return ocp.args.PyTreeRestore(shapes, restore_args=as_numpy, partial_restore=True)


def verify_checksums(state: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Raise CorruptCheckpointError unless all arrays of a state have the expected checksums."""
    wrong = [name for name, checksum in checksums(state).items() if checksum != expected.get(name)]
    if wrong:
        raise CorruptCheckpointError(f"the checksums of {len(wrong)} arrays differ, as {wrong[0]}")
