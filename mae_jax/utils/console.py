"""Console output: logging, tables and progress."""

import datetime
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import absl.logging
import numpy as np
import rich.box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True)
log = logging.getLogger("mae_jax")

LOG_INTERVAL_S = 30.0  # seconds between log lines of progress where there is no terminal

T = TypeVar("T")


def setup_logging() -> None:
    """Send the log of mae_jax to the console, above progress bars."""
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    absl.logging.set_verbosity("fatal")  # orbax logs every file, and raises its errors anyway
    sys.unraisablehook = _log_unraisable


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Log errors in threads and finalizers, except for those after a failed save.

    Then all pending writes of tensorstore's threads fail, since orbax has closed its event loop:
    dozens of tracebacks, in which the message of the first error would be lost.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def quiet_secondary_process(process: int) -> None:
    """Restrict logging on non-main processes to warnings and errors, with the process number.

    Messages that are the same on all processes go to the logger "mae_jax.run", whose warnings only
    the main process logs.
    """
    console.quiet = True
    log.handlers[0].setFormatter(logging.Formatter(f"process {process}: %(message)s"))
    log.setLevel(logging.WARNING)
    logging.getLogger("mae_jax.run").setLevel(logging.ERROR)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table with column headings to stdout."""
    table = Table(title=escape(title), box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console().print(table)


def print_summary_table(title: str, rows: Mapping[str, Any]) -> None:
    """Print names and values, floats with three digits, to stdout."""
    output = Console()
    width = min(len(title), output.width)  # so that the title fits on one line
    table = Table(title=escape(title), show_header=False, min_width=width)
    for name, value in rows.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else escape(str(value)))
    output.print(table)


def num_valid(batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of images in a batch with a "valid" mask."""
    return int(batch["valid"].sum())


def progress(
    items: Iterable[T],
    total: int,
    what: str = "images",
    count: Callable[[T], int] = lambda _: 1,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yield items; show how many of `total` are done, the throughput, and the time left.

    On a terminal that is a progress bar, elsewhere a log line every LOG_INTERVAL_S.

    Args:
      count: returns how many of `total` an item is.
      clock: returns seconds.
    """
    if not console.is_terminal:
        yield from _with_log_lines(items, total, what, count, clock)
        return
    columns = (
        TextColumn(what),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, speed="")
        for item in items:
            yield item
            bar.advance(task, count(item))
            speed = bar.tasks[task].speed
            bar.update(task, speed=f"{speed:,.0f} {what}/s" if speed else "")


def _with_log_lines(
    items: Iterable[T],
    total: int,
    what: str,
    count: Callable[[T], int],
    clock: Callable[[], float],
) -> Iterator[T]:
    begin = logged = clock()
    done = 0
    for item in items:
        yield item
        done += count(item)
        now = clock()
        if done and now - logged >= LOG_INTERVAL_S:
            rate = done / (now - begin)
            left = datetime.timedelta(seconds=round((total - done) / rate))
            log.info("%d of %d %s  %.0f %s/s  %s left", done, total, what, rate, what, left)
            logged = now
