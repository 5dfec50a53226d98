"""Stopping on request without losing work, on numbers that cannot be trained on, and on silence."""

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

SPIKE_STEPS = 128  # over which the usual loss is known ...
SPIKE_FROM = 32  # ... from so many on
NAMED = 3  # images that the log names of a batch


class NonFiniteError(Exception):
    """Losses or gradients stopped being finite numbers; the message says what to do."""


class PreemptionHandler:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours at the next step boundary.

    A second signal quits at once. Where a run has several processes, a signal to any of them stops
    all after the same step. jax sees to that, and SIGTERM is then its own: only a second Ctrl-C
    quits at once.
    """

    def __init__(self):
        self.requested = False
        self._agreed = False  # by all processes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        self._several = jax.process_count() > 1
        numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self, step: int) -> bool:
        """Whether to stop after a step; all processes have to ask about every one."""
        if self._several:
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
            return self._agreed
        return self.requested

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        # Not through a logger: the signal may have interrupted one that holds its lock.
        os.write(
            sys.stderr.fileno(),
            f"\n{name}: saving, then stopping; again to quit at once\n".encode(),
        )
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


class NonFiniteGuard:
    """Looks at the numbers of every step; those of a skipped one are no finite numbers.

    Args:
      max_bad_steps: skipped in a row, after which it is no use to go on.
      spike_sigmas: deviations above the mean of the last steps that make a loss a spike; 0: never.
      images: of a step, by name.
      note_skipped, note_spike: are told of a step what is known of it.
    """

    def __init__(
        self,
        *,
        max_bad_steps: int,
        spike_sigmas: float,
        images: Callable[[int], list[str]],
        note_skipped: Callable[[int, Mapping[str, Any]], None],
        note_spike: Callable[[int, Mapping[str, float]], None],
    ):
        self._most, self._sigmas, self._images = max_bad_steps, spike_sigmas, images
        self._note_skipped, self._note_spike = note_skipped, note_spike
        self._losses: deque[float] = deque(maxlen=SPIKE_STEPS)
        self.bad_in_a_row = 0
        self.halted = False  # once too many steps in a row were skipped, whatever comes after

    def check(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether to go on after a step with such metrics."""
        if metrics["skipped"]:
            self.bad_in_a_row += 1
            self.halted |= self.bad_in_a_row >= self._most
            self._tell_skipped(step, metrics)
        else:
            self.bad_in_a_row = 0
            self._flag_spike(step, metrics["loss"])
        return not self.halted

    def _tell_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        images = self._images(step)
        numbers = {name: str(metrics[name]) for name in ("loss", "grad_norm")}
        log.warning(
            "step %d is skipped (%d in a row, of at most %d): loss %s, grad_norm %s, images %s",
            step,
            self.bad_in_a_row,
            self._most,
            *numbers.values(),
            ", ".join(images[:NAMED])
            + (f" and {len(images) - NAMED} more" * (len(images) > NAMED)),
        )
        self._note_skipped(step, {**numbers, "images": images})

    def _flag_spike(self, step: int, loss: float) -> None:
        if self._sigmas and len(self._losses) >= SPIKE_FROM:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + self._sigmas * deviation:
                text = "the loss jumps at step %d: %.4f, after %.4f on average of the last %d steps"
                log.warning(text, step, loss, mean, len(self._losses))
                self._note_spike(step, {"loss_spike": loss})
        self._losses.append(loss)


class Watchdog:
    """Ends the process with code 1 when nothing has been noted for too long: it hangs.

    Before that it writes the stacks of all threads to stderr and to `folder`. 0 minutes: never.
    """

    def __init__(self, minutes: float, folder: Path):
        self._limit, self._folder = 60 * minutes, folder
        self._ended = threading.Event()
        self.note("starting")

    def note(self, doing: str) -> None:
        """Says what is being done from now on."""
        self._doing, self._noted = doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self._limit / 10, 5.0)):
            if time.monotonic() - self._noted > self._limit:
                self._give_up()

    def _give_up(self) -> None:
        # Whatever hangs may be the disk, or hold the interpreter: then this ends the process.
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
            f"error: process {process} of {jax.process_count()} has made no progress for "
            f"{self._limit / 60:g} minutes (health.hang_minutes). What it was at: {self._doing}. "
            f"Stacks of all threads: {path}. The same command continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if jax.process_count() > 1:
            time.sleep(15)  # for the others, which fall with this one, to say what they were at
        os._exit(1)
