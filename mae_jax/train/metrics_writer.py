"""What a run tells about itself: progress bar, metrics.jsonl, TensorBoard, profiles."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.console import console

log = logging.getLogger("mae_jax")

MAX_DATA_WAIT = 0.1  # share of the time, above which, and above a second, a warning is due


def truncate_jsonl(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops the lines after a step, and those that are none of ours; returns what stays."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            if row["step"] <= last_step:
                kept.append(row)
        except (ValueError, TypeError, KeyError):  # cut off when a run was killed, for one
            continue
    with atomic_path(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return kept


class JsonlWriter:
    """A file of one JSON object per line, without those after a step from which a run goes on.

    Where it is not `kept` nothing is read or written.
    """

    def __init__(self, path: Path, last_step: int, *, kept: bool):
        self._path, self._kept = path, kept
        self._file: TextIO | None = None  # opened by the first row
        self.rows = truncate_jsonl(path, last_step) if kept else []

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        if self._kept:
            if self._file is None:
                self._file = open(self._path, "a", buffering=1)  # noqa: SIM115
            self._file.write(json.dumps(row) + "\n")
            self.rows.append(row)

    def rewind(self, last_step: int) -> None:
        """Drops the rows after a step."""
        self.close()
        self.rows = truncate_jsonl(self._path, last_step) if self._kept else []

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
            self._file = None


class MetricsLogger:
    """Observes a training loop; also takes evaluation results and pictures.

    metrics.jsonl has one object per line, each with its "step" and:
      loss, grad_norm: means over the steps since the last line that were not skipped;
      learning_rate: at that step; skipped_steps: how many, where there are any;
      images_per_second: trained on, compilation and evaluation not counted;
      data_wait: share of that time in which the loop waited for its next batch;
      data_ready: how many batches lay ready on the devices when it asked, of 2, on average;
      host_memory, device_memory: most bytes used so far, in GB, of the (first) process and the
      fullest of its devices, where these tell;
      mfu: model FLOPs per second over the device's bf16 peak, where the peak is known.

    skipped.jsonl has the steps that were skipped, with the images of their batches.

    Args:
      flops_per_image: of one training step, in the paper's form; peak_flops: of all devices;
      advice: what to do where the loop waits for data. profile: the first step to write a profile
      of, and how many, or None. note: is told what the loop is doing. main: whether this process
      writes.
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
        profile: tuple[int, int] | None = None,
        note: Callable[[str], None] = lambda _: None,
        main: bool = True,
    ):
        self._lines = JsonlWriter(workdir / "metrics.jsonl", start_step, kept=main)
        self._skipped = JsonlWriter(workdir / "skipped.jsonl", start_step, kept=main)
        self._boards, self._main = workdir / "tensorboard", main
        self._board = self._open_board(start_step)
        self._profile, self._profiles = profile if main else None, workdir / "profile"
        self._profiling, self._note = False, note
        self._total, self._per_epoch, self._batch_size = total_steps, steps_per_epoch, batch_size
        self._every, self._flops, self._peak = every, flops_per_image, peak_flops
        self._advice: str | None = advice  # None once given
        self._window: list[Mapping[str, float]] = []
        self._started: float | None = None  # None until the first step has been compiled and run
        self._timed, self._waited, self._paused = 0, 0.0, 0.0  # steps and seconds since then
        self._ready: list[int] = []  # how many batches lay ready, each time one was taken
        columns = (TextColumn("{task.description}"), BarColumn(None))
        hidden = not (main and console.is_terminal)
        self._bar = Progress(
            *columns, console=console, auto_refresh=False, expand=True, disable=hidden
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=start_step)
        if total_steps:
            self._bar.start()

    def rewind(self, step: int) -> None:
        """Forgets what came after a step, from which the run goes on anew."""
        self._lines.rewind(step)
        self._skipped.rewind(step)
        self._board.close()
        self._board = self._open_board(step)
        self._window, self._ready, self._started = [], [], None
        self._bar.update(self._task, completed=step)

    def _open_board(self, step: int) -> SummaryWriter:
        purge = step + 1 if step else None
        folder = os.fspath(self._boards)
        return SummaryWriter(folder, purge_step=purge, write_to_disk=self._main)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends numbers to metrics.jsonl and TensorBoard."""
        self._lines.add({"step": step, "epoch": round(step / self._per_epoch, 4), **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def column(self, name: str) -> list[float]:
        """All values of a metric so far, those from before an interruption included."""
        return [row[name] for row in self._lines.rows if name in row]

    def skipped(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends what is known of a step that changed nothing to skipped.jsonl."""
        self._skipped.add({"step": step, **values})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a uint8 [h, w, 3] picture to TensorBoard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """The loop waits for data."""
        self._note(f"waiting for the images of step {step}")
        self._set_profiler(step)
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def batches_ready(self, count: int) -> None:
        """So many batches lie ready, of which the loop takes one."""
        self._ready.append(count)

    @contextmanager
    def computing(self, step: int) -> Iterator[None]:
        """The devices compute."""
        self._note(f"waiting for the devices, which compute steps {step - 1} and {step}")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _set_profiler(self, step: int) -> None:
        """Begins a profile before its first step, and ends it after its last."""
        if self._profile is None:
            return
        first, count = self._profile
        if not self._profiling and first <= step < first + count:
            jax.profiler.start_trace(os.fspath(self._profiles))
            self._profiling = True
        elif self._profiling and step >= first + count:
            self._end_profile()

    def _end_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling, self._profile = False, None
            log.info("wrote a profile to %s: tensorboard or xprof shows it", self._profiles)

    @contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """The loop saves or evaluates: time that does not count as training."""
        self._note(f"saving and evaluating after step {step}")
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
        self._describe(step, rate)
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

    def _means(self) -> dict[str, float]:
        taken = [metrics for metrics in self._window if not metrics.get("skipped")]
        names = ("loss", "grad_norm") if taken else ()
        return {name: float(np.mean([metrics[name] for metrics in taken])) for name in names}

    def _write_window(self, step: int, rate: float) -> None:
        values = self._means()
        values["learning_rate"] = float(self._window[-1]["learning_rate"])
        if skipped := sum(int(metrics.get("skipped", 0)) for metrics in self._window):
            values["skipped_steps"] = skipped
        if self._timed:
            values["images_per_second"] = round(rate, 2)
            values["data_wait"] = round(min(self._waited / self._seconds(), 1.0), 4)
        if self._ready:
            values["data_ready"] = round(float(np.mean(self._ready)), 2)
            self._ready = []
        if self._timed and self._peak:
            values["mfu"] = rate * self._flops / self._peak
        self.scalars(step, values | _memory())
        if self._bar.disable:
            log.info("%s", self._bar.tasks[self._task].description)
        self._warn_of_waiting(values.get("data_wait", 0.0))

    def _warn_of_waiting(self, share: float) -> None:
        if share > MAX_DATA_WAIT and self._waited > 1.0 and self._advice:
            text = "training waits for images in %.0f %% of its time. What helps: %s"
            log.warning(text, 100 * share, self._advice)
            self._advice = None

    def _describe(self, step: int, rate: float) -> None:
        text = f"step {step}/{self._total}  epoch {step / self._per_epoch:.2f}"
        text += f"  loss {self._means().get('loss', math.nan):.4f}"
        if rate:
            left = math.ceil((self._total - step) * self._batch_size / rate)
            text += (
                f"  {rate:,.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
            )
        self._bar.update(self._task, completed=step, description=text)
        self._bar.refresh()

    def close(self) -> None:
        """Flushes and closes everything."""
        self._end_profile()
        self._bar.stop()
        self._lines.close()
        self._skipped.close()
        self._board.close()


def _memory() -> dict[str, float]:
    """The most that was used so far, in GB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    found = {"host_memory": kilobytes * (1 if sys.platform == "darwin" else 1024)}
    used = [device.memory_stats() for device in jax.local_devices()]
    if used := [stats["peak_bytes_in_use"] for stats in used if stats]:
        found["device_memory"] = max(used)
    return {name: round(size / 1e9, 3) for name, size in found.items()}
