"""What a run tells about itself: a progress bar, metrics.jsonl and TensorBoard."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from mae_jax.console import console
from mae_jax.whole import whole

log = logging.getLogger("mae_jax")

MOST_WAITING = 0.1  # share of the time, above which, and above a second, a warning is due


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n")


def truncate_jsonl(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops the lines after a step, and one that was cut off in the middle; returns what stays."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= last_step:
            kept.append(row)
    with whole(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


class RunLog:
    """Observes a training loop; also takes evaluation results and pictures.

    metrics.jsonl has one object per line, each with its "step" and:
      loss, grad_norm: means over the steps since the last line; learning_rate: at that step;
      images_per_second: trained on, compilation and evaluation not counted;
      data_wait: share of that time in which the loop waited for its next batch;
      data_ready: how many batches lay ready on the devices when it asked, of 2, on average;
      mfu: model FLOPs per second over the device's bf16 peak, where the peak is known.

    Args:
      flops_per_image: of one training step, in the paper's form; peak_flops: of all devices;
      advice: what to do where the loop waits for data.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        every: int,
        flops_per_image: float,
        peak_flops: float | None,
        advice: str,
    ):
        self.history = truncate_jsonl(workdir / "metrics.jsonl", start_step)
        self._file = open(workdir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        purge = start_step + 1 if start_step else None
        self._board = SummaryWriter(os.fspath(workdir / "tensorboard"), purge_step=purge)
        self._total, self._per_epoch, self._batch_size = total_steps, steps_per_epoch, batch_size
        self._every, self._flops, self._peak = every, flops_per_image, peak_flops
        self._advice: str | None = advice  # None once given
        self._window: list[Mapping[str, float]] = []
        self._started: float | None = None  # None until the first step has been compiled and run
        self._timed, self._waited, self._paused = 0, 0.0, 0.0  # steps and seconds since then
        self._ready: list[int] = []  # how many batches lay ready, each time one was taken
        columns = (TextColumn("{task.description}"), BarColumn(None))
        self._bar = Progress(*columns, console=console, auto_refresh=False, expand=True)
        self._task = self._bar.add_task("compiling", total=total_steps, completed=start_step)
        if console.is_terminal and total_steps:
            self._bar.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends numbers to metrics.jsonl and TensorBoard."""
        row = {"step": step, "epoch": round(step / self._per_epoch, 4), **values}
        self.history.append(row)
        self._file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def column(self, name: str) -> list[float]:
        """All values of a metric so far, those from before an interruption included."""
        return [row[name] for row in self.history if name in row]

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a uint8 [h, w, 3] picture to TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The loop waits for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def batches_ready(self, count: int) -> None:
        """So many batches lie ready, of which the loop takes one."""
        self._ready.append(count)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The loop saves or evaluates: time that does not count as training."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes a finished step, and writes a line of metrics where one is due."""
        self._window.append(metrics)
        if self._started is None:
            self._restart_clock()
        else:
            self._timed += 1
        rate = self._batch_size * self._timed / self._seconds()
        self._describe(step, self._mean("loss"), rate)
        if step % self._every == 0 or step == self._total:
            self._write_window(step, rate)
            self._window = []
            self._restart_clock()
        if step == self._total:
            self._bar.stop()

    def _seconds(self) -> float:
        assert self._started is not None
        return max(time.perf_counter() - self._started - self._paused, 1e-9)

    def _restart_clock(self) -> None:
        self._started = time.perf_counter()
        self._timed, self._waited, self._paused = 0, 0.0, 0.0

    def _mean(self, name: str) -> float:
        return float(np.mean([metrics[name] for metrics in self._window]))

    def _write_window(self, step: int, rate: float) -> None:
        values = {
            "loss": self._mean("loss"),
            "grad_norm": self._mean("grad_norm"),
            "learning_rate": float(self._window[-1]["learning_rate"]),
        }
        if self._timed:
            values["images_per_second"] = round(rate, 2)
            values["data_wait"] = round(min(self._waited / self._seconds(), 1.0), 4)
        if self._ready:
            values["data_ready"] = round(float(np.mean(self._ready)), 2)
            self._ready = []
        if self._timed and self._peak:
            values["mfu"] = rate * self._flops / self._peak
        self.scalars(step, values)
        if not console.is_terminal:
            log.info("%s", self._bar.tasks[self._task].description)
        self._warn_of_waiting(values.get("data_wait", 0.0))

    def _warn_of_waiting(self, share: float) -> None:
        if share > MOST_WAITING and self._waited > 1.0 and self._advice:
            text = "training waits for images in %.0f %% of its time. What helps: %s"
            log.warning(text, 100 * share, self._advice)
            self._advice = None

    def _describe(self, step: int, loss: float, rate: float) -> None:
        text = f"step {step}/{self._total}  epoch {step / self._per_epoch:.2f}"
        text += f"  loss {loss:.4f}"
        if rate:
            left = math.ceil((self._total - step) * self._batch_size / rate)
            text += (
                f"  {rate:,.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
            )
        self._bar.update(self._task, completed=step, description=text)
        if console.is_terminal:
            self._bar.refresh()

    def close(self) -> None:
        """Flushes and closes everything."""
        self._bar.stop()
        self._file.close()
        self._board.close()
