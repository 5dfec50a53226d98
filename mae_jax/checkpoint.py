"""Checkpoints with orbax, believed only where they read back as they were written."""

import itertools
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax import distributed
from mae_jax.digests import digests
from mae_jax.trees import differences

log = logging.getLogger("mae_jax")

FORMAT = 2  # of what "meta" holds


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says why and what to do."""


class SaveError(Exception):
    """A checkpoint could not be written; the message says why and what is left."""


class _DamageError(Exception):
    """A step does not read back as it was written."""


class Checkpointer:
    """Saves and restores states in `directory`, one numbered folder per step.

    The parameters are an item of their own, "params", so that other programs can read them alone.
    "train" holds the rest of the state, "meta" what the run wants to know on resuming, and the
    digests by which a damaged checkpoint is recognised: orbax itself would restore flipped bytes.
    Saving goes on in the background; a step's folder appears only when it is complete, and only
    then older ones are removed. All processes of a run save and restore together.
    """

    def __init__(self, directory: Path, max_to_keep: int):
        self.directory = directory
        self._max_to_keep = max_to_keep
        self._last: int | None = None  # the step whose save may still go on
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._max_to_keep, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(
            self.directory.absolute(),
            options=options,
            item_handlers=_handlers(ocp.StandardCheckpointHandler),
        )

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Saves {"params": ..., other items of the state}; does nothing if the step is there.

        Raises:
          SaveError: this save, or the one before it, failed.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        train = {name: item for name, item in state.items() if name != "params"}
        meta = {**meta, "format": FORMAT, "digests": digests(state)}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            train=ocp.args.StandardSave(train),
            meta=ocp.args.JsonSave(meta | {"crc": _crc(meta)}),
        )
        self._last = step
        with self._saving():
            self._manager.save(step, args=arguments)

    def check(self) -> None:
        """SaveError if the save in the background has failed by now."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits for the save in the background; SaveError if it fails."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax has no common class for what can go wrong
            for part in self.directory.glob(f"{self._last}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)  # it may be what fills the disk
            steps = _steps_in(self.directory)
            kept = (
                f"the last complete one is that of step {steps[-1]}" if steps else "there is none"
            )
            raise SaveError(
                f"the checkpoint of step {self._last} could not be written to {self.directory} "
                f"({_reason(error)}); {kept}. Make room or mend the disk: the same command goes on "
                "from there"
            ) from error

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
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(shapes),
            dict(shardings),
        )
        steps = sorted(self._manager.all_steps(), reverse=True)
        distributed.check_same({f"list of checkpoints in {self.directory}": str(steps)})
        for step in steps:
            try:
                with distributed.together():
                    meta, state = self._read(step, wanted, accept)
                _check_digests(state, meta["digests"])  # computed together: all find the same
                return step, state
            except _DamageError as error:
                self._set_aside(step, str(error))
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (renamed to *.damaged). To start "
                "anew, use another --workdir"
            )
        return None

    def _read(
        self, step: int, wanted: Mapping[str, Any], accept: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A step's meta and state; each process reads what it holds, and waits for nobody."""
        params, train = wanted["params"], {k: v for k, v in wanted.items() if k != "params"}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), train=ocp.args.StandardRestore(train)
        )
        with _reader(self.directory, ocp.StandardCheckpointHandler) as manager:
            with _damage():
                meta, stored = _read_meta(manager, step), manager.item_metadata(step)["params"]
                if stored is None:
                    raise ValueError("it has no parameters")
            accept(meta)
            self._check_fits(step, params, stored.tree)
            with _damage():
                restored = manager.restore(step, args=arguments)
        return meta, {"params": restored["params"], **restored["train"]}

    def _check_fits(self, step: int, wanted: Mapping, stored: Mapping) -> None:
        wrong = differences(wanted, stored)
        if wrong:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} does not fit the model:\n  "
                + "\n  ".join(wrong)
            )

    def _set_aside(self, step: int, reason: str) -> None:
        """Renames a damaged step; left in place it would count as the newest for ever."""
        folder = self.directory / str(step)
        kept = next(
            path
            for number in itertools.count()
            if not (path := folder.with_name(f"{step}.damaged{number or ''}")).exists()
        )
        log.warning("checkpoint %s is damaged and renamed to %s: %s", folder, kept.name, reason)
        self._manager.close()
        with distributed.together():
            if distributed.is_main():
                folder.rename(kept)
        self._manager = self._open()

    def close(self) -> None:
        """Waits for the save in the background, and releases everything."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # else the others may wait for something else
            with suppress(Exception):  # what has been raised already matters more
                self.close()


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
    with _reader(directory, ocp.PyTreeCheckpointHandler) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise CheckpointError(f"{directory} has no step {step}; it has {steps}")
        for number in steps if step is None else [step]:
            try:
                with _damage():
                    meta = _read_meta(manager, number)
                    found = [_read_item(manager, number, item, meta["digests"]) for item in items]
                return number, found, meta
            except _DamageError as error:
                log.warning("checkpoint %s is damaged: %s", directory / str(number), error)
    which = "holds no checkpoint" if step is None else f"has a step {step}, but none"
    raise CheckpointError(f"{directory} {which} that can be read; its steps are {steps}")


def _handlers(arrays: Callable[..., Any], **options: Any) -> dict[str, Any]:
    return {
        "params": arrays(**options),
        "train": arrays(**options),
        "meta": ocp.JsonCheckpointHandler(**options),
    }


@contextmanager
def _reader(directory: Path, arrays: Callable[..., Any]) -> Iterator[ocp.CheckpointManager]:
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
    handlers = _handlers(arrays, multiprocessing_options=alone)
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
def _damage() -> Iterator[None]:
    """Makes of whatever reading raises a _DamageError."""
    try:
        yield
    except (CheckpointError, _DamageError):
        raise
    except Exception as error:  # orbax has no common class for what can go wrong
        raise _DamageError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """What an error says, on one line; the first words of tensorstore's are the least telling."""
    text = str(error).strip()
    for known in ("No space left on device", "File too large", "Read-only file system"):
        if known in text:
            return known
    return text.splitlines()[0][:200] if text else repr(error)


def _steps_in(directory: Path) -> list[int]:
    """Steps whose folders are complete, in order."""
    with suppress(OSError):
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    return []


def _crc(meta: Mapping[str, Any]) -> int:
    """Of what a run says of a step, in the form in which it is read back."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    crc, known = meta.pop("crc", None), "format" in meta  # the first format had neither
    if known and crc != _crc(meta):
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
    _check_digests(state, expected)
    return state[item]


def _check_digests(state: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """_DamageError unless the arrays of a state are those that were saved."""
    changed = [name for name, digest in digests(state).items() if digest != expected.get(name)]
    if changed:
        raise _DamageError(f"{len(changed)} arrays are not what was saved, {changed[0]} for one")
