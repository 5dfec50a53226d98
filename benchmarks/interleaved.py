"""Interleaved timing: rounds in alternating order, steady state, paired ratios.

A machine whose speed drifts changes all measurements of a round alike, so ratios are taken within
a round and summarized over the rounds.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from benchmarks.environment import cpu_seconds

Timing = Mapping[str, float]  # seconds by clock ("wall", "cpu") and the number of "steps"
STEADY = 0.02  # relative difference between the last three bursts that ends a warm-up


def round_orders(names: Sequence[str], rounds: int) -> Iterator[Sequence[str]]:
    """Yield the order of every round: forward, backward, forward, ..."""
    for number in range(rounds):
        yield names if number % 2 == 0 else names[::-1]


def per_step(timing: Timing, clock: str = "wall") -> float:
    """Return the seconds of one step."""
    return timing[clock] / timing["steps"]


def is_steady(timings: Sequence[Timing]) -> bool:
    """Return True if the last three took about the same time per step."""
    last = [per_step(timing) for timing in timings[-3:]]
    return len(last) == 3 and max(last) - min(last) <= STEADY * median(last)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(
    rounds: Sequence[Mapping[str, Timing]], name: str, baseline: str, clock: str
) -> dict[str, float]:
    """Return the spread over the rounds of a name's time per step over that of the baseline."""
    pairs = [(timings[name], timings[baseline]) for timings in rounds]
    return spread([per_step(one, clock) / per_step(other, clock) for one, other in pairs])


class Stopwatch:
    """Wall time, and CPU time of this process and its descendants."""

    def __init__(self):
        self._start = self._now()

    def read(self) -> dict[str, float]:
        """Return seconds of "wall" and "cpu" since it was created."""
        return {clock: now - self._start[clock] for clock, now in self._now().items()}

    def _now(self) -> dict[str, float]:
        return {"wall": time.perf_counter(), "cpu": cpu_seconds(os.getpid())}
