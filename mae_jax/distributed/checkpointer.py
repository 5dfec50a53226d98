"""Orbax checkpoints with integrity verification."""

import copy
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import LatestN

from mae_jax.distributed import processes
from mae_jax.distributed.checkpoint_mirror import CheckpointMirror
from mae_jax.distributed.checkpoint_reader import (
    FORMAT,
    CheckpointError,
    CorruptCheckpointError,
    make_handlers,
    meta_crc,
    open_reader,
    read_meta,
    summarize_error,
    verify_checksums,
    verify_step,
    wrap_read_errors,
)
from mae_jax.distributed.checksums import checksums
from mae_jax.distributed.glob_safe import glob_safe
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import diff

log = logging.getLogger("mae_jax.run")

# orbax collects these for its debug log at every save, and tensorstore never frees them: 80 kB.
tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []

# Nor does tensorstore (0.1.86) free the texts of this, which orbax asks for at every save of every
# array, with the same folder for all of them.
_to_json = tensorstore.KvStore.Spec.to_json
_json_by_text: dict[str, Any] = {}  # of the last specs


def _to_json_once(self: Any, include_defaults: bool = False) -> Any:
    text = repr((self, include_defaults))
    json = _json_by_text.get(text)
    if json is None:
        json = _to_json(self, include_defaults)
        if len(_json_by_text) > 8:
            _json_by_text.clear()
        _json_by_text[text] = json
    return copy.deepcopy(json)


tensorstore.KvStore.Spec.to_json = _to_json_once


class CheckpointSaveError(Exception):
    """A checkpoint that could not be written: why, and which one is the last."""


class Checkpointer:
    """Saves and restores train states in `directory`, one folder per step.

    The parameters are an item of their own, "params", so that other programs can read them alone;
    "train" has the rest of the state, "meta" the metadata of the run and the checksums of all
    arrays: orbax alone would restore flipped bits. Saving is asynchronous and atomic: the folder of
    a step appears when it is complete, and only then older ones are removed. The first save is read
    back at once, before any older one is removed, to find what makes all of them unreadable.

    All processes of a run must save and restore together. Reading opens a second, single-process
    manager (`open_reader`): the first has barriers, at which the other processes would wait forever
    for one that finds a corrupt file.

    With a mirror, the latest step is downloaded from there if the directory lacks it, or the one
    before if that turns out to be corrupt, and every complete step is uploaded in the background,
    by the main process.
    """

    def __init__(self, directory: Path, max_to_keep: int, mirror: CheckpointMirror | None = None):
        self.directory = directory
        self._max_to_keep = max_to_keep
        self._mirror = mirror
        self._last: int | None = None  # step of the last restore or save, perhaps in progress
        self._retention = LatestN(None)  # keeps all until the first save is verified
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if self._mirror:
            self._wait_for_mirror(required=False)
            with processes.raise_together():
                if processes.is_main():
                    self._mirror.fetch()
        self._resources = ExitStack()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention, cleanup_tmp_directories=True
        )
        manager = ocp.CheckpointManager(
            self._resources.enter_context(glob_safe(self.directory)),
            options=options,
            item_handlers=make_handlers(ocp.StandardCheckpointHandler),
        )
        self._resources.callback(manager.close)
        # Held open, so that no other folder can get its number.
        self._folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        self._resources.callback(os.close, self._folder)
        return manager

    def save(self, step: int, state: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Start saving {"params": ..., other items of the state}, unless the step exists.

        Raises:
          CheckpointSaveError: this save, or the one before it, failed.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        self._wait_for_mirror(required=False)
        train = {name: item for name, item in state.items() if name != "params"}
        meta = {**meta, "format": FORMAT, "digests": checksums(state)}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            train=ocp.args.StandardSave(train),
            meta=ocp.args.JsonSave(meta | {"crc": meta_crc(meta)}),
        )
        self._last = step
        with self._saving():
            with processes.raise_together():
                self._check_folder()
            self._manager.save(step, args=arguments)
        if self._retention.n is None:
            self.wait()
            self._verify(step, state)

    def _check_folder(self) -> None:
        """Raise FileNotFoundError if the folder was deleted, moved or unmounted.

        Another run may use the path by now, or another disk lie below it.
        """
        try:
            same = os.path.samestat(os.fstat(self._folder), os.stat(self.directory))
        except OSError:
            same = False
        if not same:
            raise FileNotFoundError(f"{self.directory} was deleted, moved or unmounted")

    def _verify(self, step: int, state: Mapping[str, Any]) -> None:
        """Read the first save back, then remove the oldest steps; raise CheckpointSaveError."""
        try:
            with processes.raise_together():
                verify_step(self.directory, step, state)
        except (CheckpointError, CorruptCheckpointError) as error:
            raise CheckpointSaveError(
                f"the checkpoint of step {step} was written to {self.directory / str(step)}, but "
                f"cannot be read back ({error}). Repair the disk, or choose another --workdir"
            ) from error
        self._retention.n = self._max_to_keep
        for old in sorted(self._manager.all_steps())[: -self._max_to_keep]:
            self._manager.delete(old)

    def raise_if_failed(self) -> None:
        """Raise CheckpointSaveError if the save in the background has failed by now."""
        # `check_for_errors` would hide the error from the thread that waits for the save.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in the background; raise CheckpointSaveError if it fails."""
        with self._saving():
            self._manager.wait_until_finished()
        if self._mirror and self._last is not None and processes.is_main():
            self._mirror.start(self._last)

    def _wait_for_mirror(self, *, required: bool) -> None:
        """Wait for the upload of the last step; log why it failed, or raise if it is required."""
        if not self._mirror:
            return
        try:
            with processes.raise_together():
                self._mirror.wait()
        except (UserError, OSError) as error:
            problem = f"the checkpoint of step {self._last} is not in {self._mirror.address}"
            if required:
                raise CheckpointSaveError(
                    f"{problem} ({error}), only in {self.directory}. The same command resumes from "
                    "there"
                ) from error
            log.error("%s: %s. Training goes on, and the next one will be copied", problem, error)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax has no common base class
            self._remove_partial()
            steps = _list_steps(self.directory)
            kept = f"the last complete one is of step {steps[-1]}" if steps else "there is none yet"
            raise CheckpointSaveError(
                f"the checkpoint of step {self._last} could not be written to {self.directory} "
                f"({summarize_error(error)}); {kept}. Free some space or repair the disk: the same "
                "command resumes from there"
            ) from error

    def restore_latest(
        self,
        shapes: Mapping[str, Any],
        shardings: Mapping[str, Any],
        validate_meta: Callable[[dict[str, Any]], None],
    ) -> tuple[int, dict[str, Any]] | None:
        """Return the latest step that passes verification, and its state; None without any step.

        Corrupt steps are renamed to "<step>.damaged", with a warning.

        Args:
          shapes, shardings: of the items of the state.
          validate_meta: called with the metadata of a step; raises if the run must not resume it.

        Raises:
          CheckpointError: a step does not fit the model or cannot be read now, or all steps are
            corrupt.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(shapes),
            dict(shardings),
        )
        while True:
            steps = sorted(self._manager.all_steps())
            processes.assert_equal_across_processes(
                {f"list of checkpoints in {self.directory}": str(steps)}
            )
            if not steps:
                break
            step = steps[-1]
            try:
                state = self._restore_verified(step, target, validate_meta)
                self._last = step
                return step, state
            except CorruptCheckpointError as error:
                self._quarantine(step, str(error))
        if any(self.directory.glob("*.damaged*")):  # of this restore or of an earlier one
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (renamed to *.damaged); to start "
                "from scratch, use another --workdir"
            )
        return None

    def _restore_verified(
        self, step: int, target: Mapping[str, Any], validate_meta: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        with processes.raise_together():
            meta, state = self._restore(step, target, validate_meta)
        verify_checksums(state, meta["digests"])  # global sums: all processes get the same
        return state

    def _restore(
        self, step: int, target: Mapping[str, Any], validate_meta: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the metadata and the state of a step; each process reads its own shards."""
        params, train = target["params"], {k: v for k, v in target.items() if k != "params"}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), train=ocp.args.StandardRestore(train)
        )
        with open_reader(self.directory, ocp.StandardCheckpointHandler) as manager:
            with wrap_read_errors():
                meta, stored = read_meta(manager, step), manager.item_metadata(step)["params"]
                if stored is None:
                    raise ValueError("it has no parameters")
            validate_meta(meta)
            self._check_shapes(step, params, stored.tree)
            with wrap_read_errors():
                restored = manager.restore(step, args=arguments)
        return meta, {"params": restored["params"], **restored["train"]}

    def _check_shapes(self, step: int, expected: Mapping, stored: Mapping) -> None:
        mismatches = diff(expected, stored)
        if mismatches:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} does not fit the model:\n  "
                + "\n  ".join(mismatches)
            )

    def _quarantine(self, step: int, reason: str) -> None:
        """Rename a corrupt step; otherwise it would remain the latest one."""
        folder = self.directory / str(step)
        candidates = (folder.with_name(f"{step}.damaged{n or ''}") for n in itertools.count())
        renamed = next(path for path in candidates if not path.exists())
        log.warning("checkpoint %s is damaged and renamed to %s: %s", folder, renamed.name, reason)
        self._resources.close()
        with processes.raise_together():
            if processes.is_main():
                folder.rename(renamed)
        self._manager = self._open()

    def close(self) -> None:
        """Wait for the save and the upload in the background, and release all resources."""
        try:
            self.wait()
            self._wait_for_mirror(required=True)
        finally:
            if self._mirror:
                self._mirror.close()
            self._resources.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # with several, the others may be at another barrier
            with suppress(Exception):  # the first error matters more
                self.close()
            if kind is CheckpointSaveError:
                self._remove_partial()

    def _remove_partial(self) -> None:
        """Remove the files of a failed save; they may be what fills the disk.

        Threads of the save may still write and create them again: this tries for two seconds. What
        is left then, the next run removes.
        """
        for _ in range(20):
            partial = list(self.directory.glob(f"{self._last}.orbax-checkpoint-tmp*"))
            if not partial:
                break
            for folder in partial:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


def _list_steps(directory: Path) -> list[int]:
    """Return the steps with complete folders, in ascending order."""
    with suppress(OSError):
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    return []
