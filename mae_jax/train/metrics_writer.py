"""Metrics on disk: metrics.jsonl, skipped.jsonl and TensorBoard."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from mae_jax.utils.atomic import atomic_path


def truncate_jsonl(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the rows after a step and invalid lines; return the remaining rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= last_step:
                rows.append(row)
        except (ValueError, TypeError, KeyError):  # truncated when a run was killed, for example
            continue
    with atomic_path(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


class JsonlWriter:
    """A file with one JSON object per line, truncated to the step that a run resumes from.

    Reads and writes nothing unless `enabled`.
    """

    def __init__(self, path: Path, last_step: int, *, enabled: bool):
        self._path, self._enabled = path, enabled
        self._file: TextIO | None = None  # opened by the first row
        self.rows = truncate_jsonl(path, last_step) if enabled else []

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        if self._enabled:
            if self._file is None:
                self._file = open(self._path, "a", buffering=1)  # noqa: SIM115
            self._file.write(json.dumps(row) + "\n")
            self.rows.append(row)

    def rewind(self, last_step: int) -> None:
        """Drop the rows after a step."""
        self.close()
        self.rows = truncate_jsonl(self._path, last_step) if self._enabled else []

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


class MetricsWriter:
    """Writes metrics.jsonl, skipped.jsonl and TensorBoard files in a workdir.

    metrics.jsonl has one object per line, each with its "step", its "epoch", and what
    `MetricsLogger` or evaluators measure. skipped.jsonl has the NaN/Inf steps, with the images of
    their batches.

    Args:
      start_step: later rows are dropped, since a run resumes from there.
      enabled: False on all processes but the main one, which write nothing.
    """

    def __init__(self, workdir: Path, *, start_step: int, steps_per_epoch: float, enabled: bool):
        self._metrics = JsonlWriter(workdir / "metrics.jsonl", start_step, enabled=enabled)
        self._skipped = JsonlWriter(workdir / "skipped.jsonl", start_step, enabled=enabled)
        self._folder, self._enabled = workdir / "tensorboard", enabled
        self._steps_per_epoch = steps_per_epoch
        self._tensorboard = self._open_tensorboard(start_step)

    def _open_tensorboard(self, step: int) -> SummaryWriter:
        purge_step = step + 1 if step else None
        folder = os.fspath(self._folder)
        return SummaryWriter(folder, purge_step=purge_step, write_to_disk=self._enabled)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append numbers to metrics.jsonl and TensorBoard."""
        epoch = round(step / self._steps_per_epoch, 4)
        self._metrics.write({"step": step, "epoch": epoch, **values})
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Add a uint8 [h, w, 3] image to TensorBoard."""
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    def write_skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a skipped step to skipped.jsonl."""
        self._skipped.write({"step": step, **values})

    def history(self, name: str) -> list[float]:
        """Return all values of a metric, including those from before the run was resumed."""
        return [row[name] for row in self._metrics.rows if name in row]

    def rewind(self, step: int) -> None:
        """Drop everything after a step, from which the run continues."""
        self._metrics.rewind(step)
        self._skipped.rewind(step)
        self._tensorboard.close()
        self._tensorboard = self._open_tensorboard(step)

    def close(self) -> None:
        """Flush and close all files."""
        self._metrics.close()
        self._skipped.close()
        self._tensorboard.close()
