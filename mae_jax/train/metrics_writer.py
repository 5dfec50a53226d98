"""Metrics of a run: metrics.jsonl and skipped.jsonl in its workdir, and its loggers."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mae_jax.train.background import BackgroundLogger
from mae_jax.train.loggers import LOGGERS, RunInfo
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax.run")

CLOSE_TIMEOUT_S = 30.0  # seconds that loggers have at the end to send what is left


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Give the rows of a file with one JSON object per line, without invalid lines."""
    if not path.exists():
        return
    with open(path, errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, TypeError, KeyError):  # truncated when a run was killed, say
                continue
            yield row


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop the rows after a step, and invalid lines."""
    if path.exists():
        with atomic_path(path) as part, open(part, "w") as file:
            for row in read_jsonl(path):
                if row["step"] <= last_step:
                    file.write(json.dumps(row) + "\n")


class JsonlWriter:
    """A file with one JSON object per line, truncated to the step that a run resumes from.

    A full disk is logged once: training ends when the next checkpoint cannot be written.
    Reads and writes nothing unless `enabled`.
    """

    def __init__(self, path: Path, last_step: int, *, enabled: bool):
        self._path, self._enabled = path, enabled
        self._file: TextIO | None = None  # opened by the first row
        self._warned = False
        self.rewind(last_step)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        if not self._enabled:
            return
        try:
            if self._file is None:
                self._file = open(self._path, "a", buffering=1)  # noqa: SIM115
            self._file.write(json.dumps(row) + "\n")
        except OSError as error:
            self._warn(error)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Read all rows, including those from before the run was resumed."""
        return read_jsonl(self._path) if self._enabled else iter(())

    def rewind(self, last_step: int) -> None:
        """Drop the rows after a step."""
        self.close()
        if self._enabled:
            truncate_jsonl(self._path, last_step)

    def close(self) -> None:
        """Close the file."""
        try:
            if self._file:
                self._file.close()
        except OSError as error:
            self._warn(error)
        self._file = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s cannot be written: %s", self._path, error.strerror)


class MetricsWriter:
    """Writes metrics.jsonl and skipped.jsonl in a workdir, and hands metrics to loggers.

    metrics.jsonl has one object per line, each with its "step", its "epoch", and what
    `MetricsLogger` or evaluators measure. skipped.jsonl has the NaN/Inf steps, with the images of
    their batches.

    Args:
      start_step: later rows are dropped, since a run resumes from there.
      enabled: False on all processes but the main one, which write nothing.
      to: names of LOGGERS, and "jsonl" for metrics.jsonl.
      run: what loggers show of the run; by default, its workdir.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        steps_per_epoch: float,
        enabled: bool,
        to: Sequence[str] = ("jsonl", "tensorboard"),
        run: RunInfo | None = None,
    ):
        jsonl = enabled and "jsonl" in to
        self._metrics = JsonlWriter(workdir / "metrics.jsonl", start_step, enabled=jsonl)
        self._skipped = JsonlWriter(workdir / "skipped.jsonl", start_step, enabled=enabled)
        self._steps_per_epoch = steps_per_epoch
        run, rows = run or RunInfo(workdir), self._metrics.rows if jsonl else None
        self._loggers = [
            BackgroundLogger(name, make, run, start_step, rows)
            for name, make in LOGGERS.items()
            if enabled and name in to
        ]

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append numbers to metrics.jsonl, and log them."""
        values = {"epoch": round(step / self._steps_per_epoch, 4), **values}
        self._metrics.write({"step": step, **values})
        for logger in self._loggers:
            logger.scalars(step, values)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a uint8 [h, w, 3] image."""
        for logger in self._loggers:
            logger.picture(step, name, image)

    def write_skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a skipped step to skipped.jsonl."""
        self._skipped.write({"step": step, **values})

    def history(self, name: str) -> list[float]:
        """Return all values of a metric, including those from before the run was resumed."""
        return [row[name] for row in self._metrics.rows() if name in row]

    def rewind(self, step: int) -> None:
        """Drop everything after a step, from which the run continues."""
        self._metrics.rewind(step)
        self._skipped.rewind(step)
        for logger in self._loggers:
            logger.rewind(step)

    def close(self) -> None:
        """Close all files, and give the loggers some time to send what is left."""
        self._metrics.close()
        self._skipped.close()
        for logger in self._loggers:
            logger.finish()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for logger in self._loggers:
            logger.join(deadline)
