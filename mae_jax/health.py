"""Stopping on request without losing work, and stopping on numbers that cannot be trained on."""

import math
import os
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any


class NonFiniteError(Exception):
    """The loss is not a finite number; training on would destroy the parameters."""


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours at the next step boundary.

    A second signal quits at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
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


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """NonFiniteError unless loss and gradients are finite numbers."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NonFiniteError(
                f"{name} is {metrics[name]} at step {step}. Nothing of it was saved: run the same "
                "command again to continue from the last checkpoint; if it happens again, lower "
                "optim.base_lr or set optim.clip_norm=1.0"
            )
