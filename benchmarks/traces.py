"""Where the time of a profiled program went, read from the trace that `jax.profiler` writes."""

import functools
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from benchmarks.operations import (
    CATEGORIES,
    CONTROL,
    IDLE,
    Operation,
    by_kernel_name,
    category,
    kernel_category,
    part,
)

LONGEST = 20  # operations that are named


@dataclass(frozen=True)
class Interval:
    """A kernel, or on a CPU an operation, that ran from `start` to `end`, in nanoseconds."""

    name: str
    start: float
    end: float


def read_intervals(folder: Path, module: str) -> list[Interval]:
    """What the first device ran, from a trace in a folder; module: the program's name, for a CPU.

    Raises:
      ValueError: there is nothing.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    planes = [plane for file in files for plane in ProfileData.from_file(str(file)).planes]
    gpus = sorted((p for p in planes if p.name.startswith("/device:GPU")), key=lambda p: p.name)
    if gpus:
        found = list(_of_gpu(gpus[0]))
    else:
        hosts = (plane for plane in planes if plane.name == "/host:CPU")
        found = [interval for plane in hosts for interval in _of_cpu(plane, module)]
    if not found:
        raise ValueError(f"the profiler saw no operation of {module} in {folder}")
    return found


def _of_gpu(plane: Any) -> Iterator[Interval]:
    """The kernels of all streams, under the names of their instructions where these are known."""
    for line in plane.lines:
        if line.name.startswith("Stream"):
            for event in line.events:
                name = dict(event.stats).get("hlo_op") or event.name
                yield Interval(str(name), event.start_ns, event.start_ns + event.duration_ns)


def _of_cpu(plane: Any, module: str) -> Iterator[Interval]:
    """The operations of a program on all threads.

    An operation that other threads help with has a second event where it ends, or later.
    """
    begun: list[tuple[str, float, float, Any]] = []
    ends: dict[Any, float] = {}
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if event.name.startswith("end: "):
                ends[stats.get("_c")] = event.start_ns
            elif stats.get("hlo_module") == module:
                end = event.start_ns + event.duration_ns
                begun.append((str(stats["hlo_op"]), event.start_ns, end, stats.get("_p")))
    for name, start, end, number in begun:
        yield Interval(name, start, max(end, ends.get(number, end)))


def ended(intervals: Sequence[Interval], program: Mapping[str, Operation]) -> list[Interval]:
    """The intervals, none of which lasts longer than until another begins that reads its result.

    A CPU's thread that ends an operation tells of it only after it has gone on with the next ones.
    """
    starts: dict[str, list[float]] = {}
    for each in sorted(intervals, key=lambda each: each.start):
        starts.setdefault(each.name, []).append(each.start)
    users: dict[str, list[str]] = {}
    for operation in program.values():
        for operand in operation.operands:
            users.setdefault(operand, []).append(operation.name)

    @functools.cache
    def readers(name: str) -> frozenset[str]:
        """The operations seen that read a result, be it through others that were not seen."""
        found = users.get(name, [])
        through = (readers(user) for user in found if user not in starts)
        return frozenset(user for user in found if user in starts).union(*through)

    def end(each: Interval) -> float:
        times = (starts[name] for name in readers(each.name))
        next_times = (found[bisect_left(found, each.start) :][:1] for found in times)
        return min([each.end, *itertools.chain.from_iterable(next_times)])

    return [replace(each, end=end(each)) for each in intervals]


def attribute(intervals: Iterable[Interval]) -> tuple[dict[str, float], float]:
    """Nanoseconds by name, and nanoseconds in which nothing ran.

    A moment in which several run is shared equally among them, so that all together are the time
    from the first start to the last end.
    """
    edges = sorted(
        (time, begins, number, interval.name)
        for number, interval in enumerate(intervals)
        if interval.end > interval.start
        for time, begins in ((interval.start, True), (interval.end, False))
    )
    taken: dict[str, float] = {}
    idle, last = 0.0, edges[0][0]
    running: dict[int, str] = {}
    for time, begins, number, name in edges:
        for other in running.values():
            taken[other] = taken.get(other, 0.0) + (time - last) / len(running)
        idle += 0.0 if running else time - last
        last = time
        if begins:
            running[number] = name
        else:
            del running[number]
    return taken, idle


def shares(intervals: Iterable[Interval], program: Mapping[str, Operation]) -> dict[str, Any]:
    """Shares of the time by category, by part of the step, and of the longest operations.

    unknown: the share of operations that are none of the program's, which their kernels' names
    alone tell the category of. Categories, with idle, sum to 1, and so do parts.
    """
    kernels = by_kernel_name(program)
    find = lambda name: program.get(name) or kernels.get(name)
    controls = lambda name: (operation := find(name)) is not None and operation.opcode in CONTROL
    seen = [each for each in intervals if not controls(each.name)]
    taken, idle = attribute(seen)
    total = sum(taken.values()) + idle
    categories = dict.fromkeys(CATEGORIES, 0.0) | {IDLE: idle / total}
    parts, unknown = {IDLE: idle / total}, 0.0
    longest = []
    for name, time in sorted(taken.items(), key=lambda item: -item[1]):
        operation, share = find(name), time / total
        kind = category(operation) if operation else kernel_category(name)
        where = part(operation) if operation else "unknown"
        categories[kind] += share
        parts[where] = parts.get(where, 0.0) + share
        unknown += 0.0 if operation else share
        count = sum(each.name == name for each in seen) if len(longest) < LONGEST else 0
        if count:
            row = {"name": name, "category": kind, "part": where, "share": share, "runs": count}
            longest.append(row | {"path": operation.path if operation else ""})
    return {
        "nanoseconds": total,
        "categories": categories,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "unknown": unknown,
        "longest": longest,
    }
