"""Checkpoints with orbax, believed only where they read back as they were written."""

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mae_jax.distributed import processes
from mae_jax.distributed.checkpoint_reader import (
    FORMAT,
    CheckpointError,
    CorruptCheckpointError,
    check_digests,
    make_handlers,
    meta_crc,
    open_reader,
    read_meta,
    summarize_error,
    wrap_read_errors,
)
from mae_jax.distributed.checksums import checksums
from mae_jax.utils.pytree import diff

log = logging.getLogger("mae_jax.run")


class CheckpointSaveError(Exception):
    """A checkpoint could not be written; the message says why and what is left."""


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
            item_handlers=make_handlers(ocp.StandardCheckpointHandler),
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
        meta = {**meta, "format": FORMAT, "digests": checksums(state)}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardSave(state["params"]),
            train=ocp.args.StandardSave(train),
            meta=ocp.args.JsonSave(meta | {"crc": meta_crc(meta)}),
        )
        self._last = step
        with self._saving():
            self._manager.save(step, args=arguments)

    def check(self) -> None:
        """SaveError if the save in the background has failed by now."""
        # Not by `check_for_errors`: it would take the error from the thread that is to see it.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background; SaveError if it fails."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax has no common class for what can go wrong
            self._clear()
            steps = _steps_in(self.directory)
            kept = (
                f"the last complete one is that of step {steps[-1]}" if steps else "there is none"
            )
            raise CheckpointSaveError(
                f"the checkpoint of step {self._last} could not be written to {self.directory} "
                f"({summarize_error(error)}); {kept}. Make room or mend the disk: the same command goes "
                "on from there"
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
          CheckpointError: a step does not fit the model or cannot be read just now, or all steps
            are damaged.
        """
        wanted = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(shapes),
            dict(shardings),
        )
        steps = sorted(self._manager.all_steps(), reverse=True)
        processes.assert_equal_across_processes(
            {f"list of checkpoints in {self.directory}": str(steps)}
        )
        for step in steps:
            try:
                return step, self._read_verified(step, wanted, accept)
            except CorruptCheckpointError as error:
                self._set_aside(step, str(error))
        if any(self.directory.glob("*.damaged*")):  # of now, or of an earlier try
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged (renamed to *.damaged). To start "
                "anew, use another --workdir"
            )
        return None

    def _read_verified(
        self, step: int, wanted: Mapping[str, Any], accept: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        with processes.raise_together():
            meta, state = self._read(step, wanted, accept)
        check_digests(state, meta["digests"])  # computed together: all find the same
        return state

    def _read(
        self, step: int, wanted: Mapping[str, Any], accept: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A step's meta and state; each process reads what it holds, and waits for nobody."""
        params, train = wanted["params"], {k: v for k, v in wanted.items() if k != "params"}
        arguments = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), train=ocp.args.StandardRestore(train)
        )
        with open_reader(self.directory, ocp.StandardCheckpointHandler) as manager:
            with wrap_read_errors():
                meta, stored = read_meta(manager, step), manager.item_metadata(step)["params"]
                if stored is None:
                    raise ValueError("it has no parameters")
            accept(meta)
            self._check_fits(step, params, stored.tree)
            with wrap_read_errors():
                restored = manager.restore(step, args=arguments)
        return meta, {"params": restored["params"], **restored["train"]}

    def _check_fits(self, step: int, wanted: Mapping, stored: Mapping) -> None:
        wrong = diff(wanted, stored)
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
        with processes.raise_together():
            if processes.is_main():
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
            if kind is CheckpointSaveError:
                self._clear()  # threads of it may have gone on writing

    def _clear(self) -> None:
        """Removes what a save that failed has left; it may be what fills the disk."""
        for part in self.directory.glob(f"{self._last}.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)


def _steps_in(directory: Path) -> list[int]:
    """Steps whose folders are complete, in order."""
    with suppress(OSError):
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    return []
