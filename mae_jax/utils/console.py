"""What a person sees: the log, tables, and the progress of long work."""

import logging
import sys
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

T = TypeVar("T")


def setup_logging() -> None:
    """Sends this project's log to the console, above the progress bar where there is one."""
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_level=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    absl.logging.set_verbosity("fatal")  # orbax tells of every file, and raises what goes wrong
    sys.unraisablehook = _log_unraisable


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Tells of errors in threads and finalizers, but not of those that only follow from another.

    When a save fails, every write that tensorstore's threads still had to do finds that orbax has
    closed its event loop: dozens of tracebacks around, and after, the one message that counts.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def quiet_secondary_process(process: int) -> None:
    """Of the processes of a run only the first tells of it; of others, what befalls them alone.

    What all processes would say alike goes to the logger "mae_jax.run".
    """
    console.quiet = True
    log.handlers[0].setFormatter(logging.Formatter(f"process {process}: %(message)s"))
    log.setLevel(logging.WARNING)
    logging.getLogger("mae_jax.run").setLevel(logging.ERROR)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table with a heading for every column to the standard output."""
    table = Table(title=escape(title), box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number > 1 else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    Console().print(table)


def print_summary_table(title: str, rows: Mapping[str, Any]) -> None:
    """Prints names and values, floats to three digits, to the standard output."""
    output = Console()
    width = min(len(title), output.width)  # for a title on one line where that can be
    table = Table(title=escape(title), show_header=False, min_width=width)
    for name, value in rows.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else escape(str(value)))
    output.print(table)


def num_valid(batch: Mapping[str, np.ndarray]) -> int:
    """How many images a batch with a "valid" mask has."""
    return int(batch["valid"].sum())


def progress(
    items: Iterable[T], total: int, what: str = "images", count: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Passes items on, with a bar of how many of `total` are done, how fast, and the time left."""
    columns = (
        TextColumn(what),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, speed="")
        for item in items:
            yield item
            bar.advance(task, count(item))
            speed = bar.tasks[task].speed
            bar.update(task, speed=f"{speed:,.0f} {what}/s" if speed else "")
