"""Progress of a training loop: throughput, time left, input wait, memory, MFU and profiles."""

import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.utils.console import console

log = logging.getLogger("mae_jax")

MAX_DATA_WAIT = 0.1  # fraction of the time above which, and above a second, a warning is due


class StepTimer:
    """Measures throughput and the time spent waiting for data, over a window of steps.

    A step lasts from the end of one dispatch to the end of the next, each with the wait for the
    step before. This is the time of one computation, whether a dispatch returns at once or, as for
    small steps on a CPU, computes. Compilation (the first dispatch) and pauses do not count.

    Args:
      clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._last: float | None = None  # end of the last dispatch
        self._wait, self._pause = 0.0, 0.0  # since then
        self.restart()

    def dispatched(self) -> None:
        """Count a step; the first one starts the clock."""
        now = self._clock()
        if self._last is not None:
            self.steps += 1
            self.seconds += now - self._last - self._pause
            self.waited += self._wait
        self._last, self._wait, self._pause = now, 0.0, 0.0

    def restart(self) -> None:
        """Start a new window."""
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def reset(self) -> None:
        """Forget everything until the next step."""
        self._last = None
        self.restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        begin = self._clock()
        yield
        self._wait += self._clock() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
        begin = self._clock()
        yield
        self._pause += self._clock() - begin

    @property
    def steps_per_second(self) -> float:
        """Return the throughput; 0 before the second step."""
        return self.steps / max(self.seconds, 1e-9) if self.steps else 0.0

    @property
    def wait_fraction(self) -> float:
        """Return the fraction of the window spent waiting for data."""
        return min(self.waited / self.seconds, 1.0) if self.seconds else 0.0


class Profiler:
    """Writes a jax profile of some steps to a folder.

    Args:
      first, count: the steps to profile; `first` None profiles nothing.
    """

    def __init__(self, folder: Path, first: int | None, count: int):
        self._folder, self._first, self._count = folder, first, count
        self._active = False

    def before_step(self, step: int) -> None:
        """Start the profile before its first step, and stop it after its last."""
        if self._first is None:
            return
        if not self._active and self._first <= step < self._first + self._count:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._active = True
        elif self._active and step >= self._first + self._count:
            self.stop()

    def stop(self) -> None:
        """Stop the profile if it is running."""
        if self._active:
            jax.profiler.stop_trace()
            self._active, self._first = False, None
            log.info("wrote a profile to %s: view it in TensorBoard or xprof", self._folder)


class MetricsLogger:
    """Observes a training loop: progress bar, log lines, and a row of metrics every few steps.

    The rows have:
      loss, grad_norm: means over the steps since the last row that were not skipped;
      learning_rate: at that step; skipped_steps: number of NaN/Inf steps, if any;
      images_per_second: without compilation and evaluation;
      data_wait: fraction of that time in which the loop waited for its next batch;
      data_ready: mean number of prefetched batches (of 2) when the loop took one;
      host_memory, device_memory: peak of this process and of its fullest device, GB;
      mfu: model FLOPs utilization: FLOPs per second over the devices' bf16 peak, where it is known.

    Args:
      every: steps between rows.
      flops_per_image: model FLOPs of one training step; peak_flops: of all devices, per second.
      input_bound_hint: what to do when the loop waits for data.
      heartbeat: called with what the loop is doing.
      show: whether this process shows the progress.
      clock: returns seconds.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: float,
        batch_size: int,
        every: int,
        flops_per_image: float,
        peak_flops: float | None,
        input_bound_hint: str,
        profiler: Profiler,
        heartbeat: Callable[[str], None] = lambda _: None,
        show: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.writer, self.heartbeat = writer, heartbeat
        self._total, self._steps_per_epoch = total_steps, steps_per_epoch
        self._batch_size, self._every = batch_size, every
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._hint: str | None = input_bound_hint  # None once logged
        self._profiler, self._timer = profiler, StepTimer(clock)
        self._window: list[Mapping[str, float]] = []
        self._ready: list[int] = []
        columns = (TextColumn("{task.description}"), BarColumn(None))
        hidden = not (show and console.is_terminal)
        self._bar = Progress(
            *columns, console=console, auto_refresh=False, expand=True, disable=hidden
        )
        self._task = self._bar.add_task("compiling", total=total_steps, completed=start_step)
        if start_step < total_steps:
            self._bar.start()

    def rewind(self, step: int) -> None:
        """Drop everything after a step, from which the run continues."""
        self.writer.rewind(step)
        self._window, self._ready = [], []
        self._timer.reset()
        self._bar.update(self._task, completed=step)

    @contextmanager
    def waiting(self, step: int) -> Iterator[None]:
        """Time the loop while it waits for data."""
        self.heartbeat(f"waiting for the images of step {step}")
        self._profiler.before_step(step)
        with self._timer.waiting():
            yield

    def batches_ready(self, count: int) -> None:
        """Record how many batches were prefetched when the loop took one."""
        self._ready.append(count)

    @contextmanager
    def computing(self, step: int) -> Iterator[None]:
        """Time a step, and annotate it in the profile."""
        self.heartbeat(f"waiting for the devices, which compute steps {step - 1} and {step}")
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._timer.dispatched()

    @contextmanager
    def paused(self, step: int) -> Iterator[None]:
        """Leave the time in which the loop saves or evaluates out of the throughput."""
        self.heartbeat(f"saving and evaluating after step {step}")
        with self._timer.paused():
            yield

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step, and write a row of metrics if one is due."""
        self._window.append(metrics)
        rate = self._batch_size * self._timer.steps_per_second
        self._describe(step, rate)
        if step % self._every == 0 or step == self._total:
            self._write_window(step, rate)
            self._window = []
            self._timer.restart()
        if step == self._total:
            self._bar.stop()

    def _window_means(self) -> dict[str, float]:
        taken = [metrics for metrics in self._window if not metrics.get("skipped")]
        names = ("loss", "grad_norm") if taken else ()
        return {name: float(np.mean([metrics[name] for metrics in taken])) for name in names}

    def _write_window(self, step: int, rate: float) -> None:
        values = self._window_means()
        values["learning_rate"] = float(self._window[-1]["learning_rate"])
        if skipped := sum(int(metrics.get("skipped", 0)) for metrics in self._window):
            values["skipped_steps"] = skipped
        if self._timer.steps:
            values["images_per_second"] = round(rate, 2)
            values["data_wait"] = round(self._timer.wait_fraction, 4)
        if self._ready:
            values["data_ready"] = round(float(np.mean(self._ready)), 2)
            self._ready = []
        if self._timer.steps and self._peak_flops:
            values["mfu"] = rate * self._flops_per_image / self._peak_flops
        self.writer.write_scalars(step, values | _peak_memory())
        if self._bar.disable:
            log.info("%s", self._bar.tasks[self._task].description)
        self._warn_input_bound(values.get("data_wait", 0.0))

    def _warn_input_bound(self, fraction: float) -> None:
        if fraction > MAX_DATA_WAIT and self._timer.waited > 1.0 and self._hint:
            text = "training waits for images %.0f %% of the time. Remedies: %s"
            log.warning(text, 100 * fraction, self._hint)
            self._hint = None

    def _describe(self, step: int, rate: float) -> None:
        text = f"step {step}/{self._total}  epoch {step / self._steps_per_epoch:.2f}"
        text += f"  loss {self._window_means().get('loss', math.nan):.4f}"
        if rate:
            left = math.ceil((self._total - step) * self._batch_size / rate)
            text += (
                f"  {rate:,.0f} images/s  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
            )
        self._bar.update(self._task, completed=step, description=text)
        self._bar.refresh()

    def close(self) -> None:
        """Flush and close everything."""
        self._profiler.stop()
        self._bar.stop()
        self.writer.close()


def _peak_memory() -> dict[str, float]:
    """Return the peak memory of this process and of its fullest device, GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"host_memory": peak * (1 if sys.platform == "darwin" else 1024)}  # from kilobytes
    stats = [device.memory_stats() for device in jax.local_devices()]
    if peaks := [device["peak_bytes_in_use"] for device in stats if device]:
        memory["device_memory"] = max(peaks)
    return {name: round(size / 1e9, 3) for name, size in memory.items()}
