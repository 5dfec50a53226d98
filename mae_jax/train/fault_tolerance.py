"""Graceful shutdown on preemption, NaN/Inf guard and hang watchdog."""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger("mae_jax.run")

SPIKE_WINDOW = 128  # steps over which mean and deviation of the loss are known ...
SPIKE_MIN_STEPS = 32  # ... once there are this many
MAX_LOGGED = 3  # images of a batch that the log names
EXIT_GRACE_S = 15  # seconds for the other processes, which fail with this one, to dump their stacks


class NonFiniteError(Exception):
    """Loss or gradients were NaN/Inf for too many consecutive steps; the message has remedies."""


class PreemptionHandler:
    """Turns SIGTERM and Ctrl-C into a request to stop, which the loop honors after the step.

    A second signal exits at once. In a run of several processes, a signal to any of them stops all
    of them after the same step. jax coordinates that and handles SIGTERM itself, so only a second
    Ctrl-C exits at once there.
    """

    def __init__(self):
        self.requested = False
        self._synced = False  # all processes know of it
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        self._multi_process = jax.process_count() > 1
        numbers = [signal.SIGINT] if self._multi_process else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self, step: int) -> bool:
        """Return whether to stop after a step; every process must ask about every step."""
        if self._multi_process:
            self._synced = self._synced or multihost_utils.reached_preemption_sync_point(step)
            return self._synced
        return self.requested

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        # Not through a logger: the signal may have interrupted one that holds its lock.
        os.write(
            sys.stderr.fileno(),
            f"\n{name}: saving, then stopping; send it again to exit at once\n".encode(),
        )
        if self._multi_process:
            os.kill(os.getpid(), signal.SIGTERM)


class NonFiniteGuard:
    """Counts skipped (NaN/Inf) steps, flags loss spikes, and decides when to abort.

    Args:
      max_bad_steps: consecutive skipped steps after which to abort.
      spike_sigmas: standard deviations above the recent mean that make a loss a spike; 0: never.
      image_names: returns the names of a step's images.
      on_skip, on_spike: called with the step and its values.
    """

    def __init__(
        self,
        *,
        max_bad_steps: int,
        spike_sigmas: float,
        image_names: Callable[[int], list[str]],
        on_skip: Callable[[int, Mapping[str, Any]], None],
        on_spike: Callable[[int, Mapping[str, float]], None],
    ):
        self._max_bad_steps, self._sigmas, self._image_names = (
            max_bad_steps,
            spike_sigmas,
            image_names,
        )
        self._on_skip, self._on_spike = on_skip, on_spike
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.consecutive_bad = 0
        self.aborted = False  # once set, it stays

    def check(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Return whether to continue after a step with these metrics."""
        if metrics["skipped"]:
            self.consecutive_bad += 1
            self.aborted |= self.consecutive_bad >= self._max_bad_steps
            self._log_skip(step, metrics)
        else:
            self.consecutive_bad = 0
            self._flag_spike(step, metrics["loss"])
        return not self.aborted

    def _log_skip(self, step: int, metrics: Mapping[str, float]) -> None:
        images = self._image_names(step)
        values = {name: str(metrics[name]) for name in ("loss", "grad_norm")}
        more = f" and {len(images) - MAX_LOGGED} more" * (len(images) > MAX_LOGGED)
        log.warning(
            "skipped step %d (NaN/Inf, %d consecutive, at most %d): loss %s, grad_norm %s, "
            "images %s",
            step,
            self.consecutive_bad,
            self._max_bad_steps,
            *values.values(),
            ", ".join(images[:MAX_LOGGED]) + more,
        )
        self._on_skip(step, {**values, "images": images})

    def _flag_spike(self, step: int, loss: float) -> None:
        if self._sigmas and len(self._losses) >= SPIKE_MIN_STEPS:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + self._sigmas * deviation:
                text = "loss spike at step %d: %.4f, after a mean of %.4f over the last %d steps"
                log.warning(text, step, loss, mean, len(self._losses))
                self._on_spike(step, {"loss_spike": loss})
        self._losses.append(loss)


class Watchdog:
    """Exits the process with code 1 if it makes no progress for too long.

    Before that it dumps the stacks of all threads to stderr and to stacks_<process>.txt.

    Args:
      minutes: without a heartbeat before the process exits; 0: never.
      folder: where the stacks are written.
      clock: returns seconds.
    """

    def __init__(self, minutes: float, folder: Path, clock: Callable[[], float] = time.monotonic):
        self._limit, self._folder, self._clock = 60 * minutes, folder, clock
        self._ended = threading.Event()
        self.heartbeat("starting")

    def heartbeat(self, activity: str) -> None:
        """Report progress, and what is being done next."""
        self._activity, self._last_heartbeat = activity, self._clock()

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    @property
    def expired(self) -> bool:
        """Return whether the last heartbeat is too old."""
        return self._limit > 0 and self._clock() - self._last_heartbeat > self._limit

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit / 10, 5.0)):
            if self.expired:
                self._dump_and_exit()

    def _dump_and_exit(self) -> None:
        # The disk may hang, or a thread hold the interpreter: then this exits the process.
        faulthandler.dump_traceback_later(60, exit=True)
        process = jax.process_index()
        path = self._folder / f"stacks_{process}.txt"
        try:
            with open(path, "w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            path = Path("the lines above")
        faulthandler.dump_traceback(sys.stderr)
        print(
            f"error: process {process} of {jax.process_count()} made no progress for "
            f"{self._limit / 60:g} minutes (health.hang_minutes) while {self._activity}. "
            f"Stacks of all threads: {path}. The same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if jax.process_count() > 1:
            time.sleep(EXIT_GRACE_S)
        os._exit(1)
