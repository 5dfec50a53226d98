"""A logger in a thread of its own, so that it can neither stop nor slow training."""

import dataclasses
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from mae_jax.train.loggers import Logger, RunInfo, describe
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax.run")

CAPACITY = 256  # rows and pictures that may wait for a logger

ReadRows = Callable[[], Iterable[Mapping[str, Any]]]  # rows of metrics.jsonl: "step" and scalars


class SentSteps:
    """The last step of each scalar that a logger got, and the id of its run.

    Args:
      path: a JSON file that keeps them, so that a run that is killed and resumed goes on with the
        same id and sends nothing twice; None keeps them in memory.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.id = secrets.token_hex(8)
        self._steps: dict[str, int] = {}
        if path and path.exists():
            try:
                saved = json.loads(path.read_text())
                self.id, self._steps = str(saved["id"]), dict(saved["steps"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("%s cannot be read (%s): a new run is logged", path, describe(error))
        self._save()

    def new(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Return the scalars that have not been sent for this step."""
        return {name: x for name, x in values.items() if step > self._steps.get(name, -1)}

    def mark(self, step: int, names: Iterable[str]) -> None:
        """Count scalars as sent."""
        self._steps |= dict.fromkeys(names, step)
        self._save()

    def _save(self) -> None:
        if self._path:
            write_json(self._path, {"id": self.id, "steps": self._steps})


class BackgroundLogger:
    """Calls a logger in a thread. Nothing that the logger does raises or blocks here.

    What fails is logged once and counted. Rows that found the queue full, or no logger, are read
    from metrics.jsonl when the logger answers again, like those from before the run was resumed.

    Args:
      make: makes the logger, in the thread; it is tried again with every row until it succeeds.
      start_step: step after which the run starts or resumes.
      read_rows: None if there is no metrics.jsonl.
    """

    def __init__(
        self,
        name: str,
        make: type[Logger],
        run: RunInfo,
        start_step: int,
        read_rows: ReadRows | None,
    ):
        self._name, self._make, self._run = name, make, run
        self._start_step, self._read_rows = start_step, read_rows
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._warned = False
        # Written by the caller's thread: rows that found the queue full, and what is lost so.
        self._late, self._dropped = 0, 0
        # Written by the logger's thread.
        self._logger: Logger | None = None
        self._sent: SentSteps | None = None
        self._behind = False  # metrics.jsonl may have rows that were not sent
        self._caught_up, self._postponed, self._failed = 0, 0, 0
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue numbers, which metrics.jsonl already has if there is one."""
        on_disk = self._read_rows is not None
        if self._has_room():
            self._queue.put(partial(self._handle, partial(self._send, step, values), on_disk))
        elif on_disk:
            self._late += 1
        else:
            self._dropped += 1

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Queue an image."""

        def send() -> None:
            assert self._logger
            self._logger.picture(step, name, image)

        if self._has_room():
            self._queue.put(partial(self._handle, send, False))
        else:
            self._dropped += 1

    def rewind(self, step: int) -> None:
        """Queue that the run goes back to a step. Loggers that do not purge keep what they have."""
        if self._make.purges:
            self._queue.put(partial(self._reopen_at, step))

    def finish(self) -> None:
        """Let the thread end when it has sent what is queued."""
        self._queue.put(None)

    def join(self, deadline: float) -> None:
        """Wait for the thread until a time of `time.monotonic`, and log how much is missing."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        missing = self._dropped + self._late - self._caught_up + self._postponed + self._failed
        state = ""
        if self._thread.is_alive():
            missing, state = missing + self._queue.qsize(), ", which does not answer"
        if missing or state:
            text = "%d rows or pictures were not logged to %s%s"
            log.warning(text, missing, self._name, state)

    def _has_room(self) -> bool:
        room = self._queue.qsize() < CAPACITY
        if not room:
            self._warn("it does not answer, or does not keep up")
        return room

    def _warn(self, problem: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("logging to %s fails (%s); training goes on", self._name, problem)

    def _work(self) -> None:
        self._attempt(self._catch_up)
        for call in iter(self._queue.get, None):
            call()
        self._attempt(self._catch_up)
        if self._logger:
            self._attempt(self._logger.close)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Return whether a call succeeds."""
        try:
            call()
        except BaseException as error:  # SystemExit, too: nothing may end the thread
            self._warn(describe(error))
            return False
        return True

    def _handle(self, send: Callable[[], None], on_disk: bool) -> None:
        """Send a row or picture, after those that were missed."""
        ready = self._attempt(self._catch_up)
        if not ready and on_disk:
            self._postponed += 1
        elif not ready or not self._attempt(send):
            self._failed += 1

    def _catch_up(self) -> None:
        """Open the logger, and send what it has missed of metrics.jsonl."""
        if self._logger is None:
            self._logger = self._open()
        late = self._late
        if not (self._behind or self._postponed or late > self._caught_up):
            return
        for step, values in self._rows():
            try:
                self._send(step, values)
            except BaseException:
                self._failed += 1
                raise
        self._behind, self._postponed, self._caught_up = False, 0, late

    def _open(self) -> Logger:
        if self._make.purges:
            self._sent = SentSteps(None)
            for step, values in self._rows():
                if step <= self._start_step:
                    self._sent.mark(step, values)
        elif self._sent is None:
            self._sent = SentSteps(self._run.workdir / "loggers" / f"{self._name}.json")
            self._behind = True
        return self._make(dataclasses.replace(self._run, id=self._sent.id), self._start_step)

    def _rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Give step and scalars of the rows of metrics.jsonl."""
        for row in self._read_rows() if self._read_rows else ():
            yield row["step"], {name: value for name, value in row.items() if name != "step"}

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        assert self._logger
        assert self._sent
        if new := self._sent.new(step, values):
            self._sent.mark(step, new)  # first: a run that is killed here must not send it again
            self._logger.scalars(step, new)

    def _reopen_at(self, step: int) -> None:
        if self._logger:
            self._attempt(self._logger.close)
        self._logger, self._start_step = None, step
