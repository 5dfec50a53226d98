"""A copy of the checkpoints of a run in an object store, from which another machine resumes.

A step is the objects below ADDRESS/checkpoints/STEP and its manifest, which lists them with their
sizes and is written last and removed first: without it, an upload was interrupted, and the step
does not exist. Only the main process of a run writes the mirror.
"""

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.errors import UserError
from mae_jax.utils.remote import RemotePath

log = logging.getLogger("mae_jax.run")

FOLDER = "checkpoints"  # in a workdir and in a mirror
MANIFEST = "manifest.json"  # in the folder of a step
THREADS = 8  # files that are copied at a time


class CheckpointMirror:
    """Copies the checkpoints of a workdir to an object store, one at a time in the background.

    Args:
      address: of the mirror, which belongs to this run alone.
      workdir: of the run.
      max_to_keep: steps in the mirror.
      files: names of files of the workdir that belong to a checkpoint, as far as they exist.
      validate_meta: called with the metadata of the latest step; raises if it is of another run.
    """

    def __init__(
        self,
        address: RemotePath,
        workdir: Path,
        max_to_keep: int,
        files: Sequence[str] = (),
        validate_meta: Callable[[dict[str, Any]], None] = lambda meta: None,
    ):
        self.address, self._workdir = address, workdir
        self._max_to_keep, self._files = max_to_keep, files
        self._validate_meta = validate_meta
        self._thread = ThreadPoolExecutor(1)
        self._upload: Future[None] | None = None
        self._step: int | None = None  # the last in the mirror, or of the upload

    def fetch(self) -> None:
        """Download the latest step and the files of the workdir, unless it has a later step.

        Steps that were found damaged in the workdir are left out.

        Raises:
          UserError, RemoteError: the store cannot be read or written, or has another run.
        """
        self._check_writable()
        folder = self._workdir / FOLDER
        local = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        steps = [
            step
            for step in list_steps(self.address / FOLDER)
            if not any(folder.glob(f"{step}.damaged*"))
        ]
        self._step = max(steps, default=None)
        self._check_run(steps)
        if not steps or max(steps) <= max(local, default=-1):
            return
        for name in self._files:
            if (self.address / name).exists() and not (self._workdir / name).exists():
                (self.address / name).download(self._workdir / name)
        download_step(self.address / FOLDER / str(max(steps)), folder / str(max(steps)))

    def _check_run(self, steps: Sequence[int]) -> None:
        """Raise what `validate_meta` raises for the latest step."""
        if not steps:
            return
        try:
            step = self.address / FOLDER / str(max(steps))
            meta = json.loads((step / "meta" / "metadata").read_text())
        except (FileNotFoundError, ValueError):
            return  # the verification of the step will say so
        self._validate_meta(meta)

    def _check_writable(self) -> None:
        """Find out before the training that objects can be written and removed."""
        probe = self.address / ".writable"
        try:
            probe.write_text("")
        except FileNotFoundError as error:
            raise UserError(f"{self.address}: there is no such bucket") from error
        probe.remove()

    def start(self, step: int) -> None:
        """Start to upload a step of the workdir, unless it was the last one."""
        if step != self._step:
            self._step, self._upload = step, self._thread.submit(self._copy, step)

    def wait(self) -> None:
        """Wait for the upload in the background.

        Raises:
          UserError, RemoteError: the last upload failed.
        """
        if self._upload:
            self._upload.result()

    def close(self) -> None:
        """Wait for the upload in the background, whether it fails or not."""
        self._thread.shutdown()

    def _copy(self, step: int) -> None:
        """Upload a step, and remove the older ones and what was left by interrupted uploads."""
        self._check_run(list_steps(self.address / FOLDER))  # another one may have started since
        source, target = self._workdir / FOLDER / str(step), self.address / FOLDER / str(step)
        _remove_step(target)
        sizes = {
            str(file.relative_to(source)): file.stat().st_size
            for file in sorted(source.rglob("*"))
            if file.is_file()
        }
        _for_each(lambda name: (target / name).upload(source / name), list(sizes))
        for name in self._files:
            if (self._workdir / name).exists():
                (self.address / name).upload(self._workdir / name)
        (target / MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=2) + "\n")
        log.info("copied the checkpoint of step %d to %s", step, target)
        kept = list_steps(self.address / FOLDER)[-self._max_to_keep :]
        for folder in (self.address / FOLDER).iterdir():
            if folder.name.isdecimal() and int(folder.name) not in kept:
                _remove_step(folder)


def _remove_step(folder: RemotePath) -> None:
    (folder / MANIFEST).remove()
    folder.remove()


def list_steps(folder: RemotePath) -> list[int]:
    """Return the steps of a mirror whose upload is complete, in ascending order."""
    try:
        found = folder.walk()
    except FileNotFoundError:
        return []
    parents = [path.parent for path in found if path.name == MANIFEST]
    names = [path.name for path in parents if path.parent == folder]
    return sorted(int(name) for name in names if name.isdecimal())


def download_step(step: RemotePath, folder: Path) -> None:
    """Download a step of a mirror to a folder, which appears when it is complete.

    Raises:
      UserError: a file is missing or has another size than when it was uploaded.
      RemoteError: the store keeps failing.
    """
    sizes: dict[str, int] = json.loads((step / MANIFEST).read_text())["sizes"]
    log.info("downloading %s: %d files, %.1f MB", step, len(sizes), sum(sizes.values()) / 1e6)
    with atomic_path(folder) as part:
        download_files(step, list(sizes), part)
        for name, size in sizes.items():
            if (part / name).stat().st_size != size:
                raise UserError(
                    f"{step / name} has not the {size} bytes that were uploaded: remove {step}, "
                    "and the step before it is used"
                )


def download_files(source: RemotePath, names: Sequence[str], folder: Path) -> None:
    """Download objects below an address to files of the same names in a folder."""

    def download(name: str) -> None:
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"{source} has an object {name!r}, which is no file in a folder")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            (source / name).download(folder / name)
        except FileNotFoundError as error:
            raise UserError(f"{source / name} is missing: {source} is incomplete") from error

    folder.mkdir(parents=True, exist_ok=True)
    _for_each(download, names)


def _for_each(function: Callable[[str], Any], names: Sequence[str]) -> None:
    """Call a function with every name, in several threads; the first error ends it."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            list(pool.map(function, names))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
