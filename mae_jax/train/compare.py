"""Compare several runs: a table of their results, the config keys that differ, and curves.

mae-jax compare WORKDIR... [--out curves.png]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.tasks.yardsticks import DESCRIPTIONS
from mae_jax.utils import cli, console
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

COLUMNS = {  # of the table: metric by heading, and its format
    "k-NN": ("knn_top1", "{:.3f}"),
    "RankMe": ("rankme", "{:.1f}"),
    "top-1": ("top1", "{:.3f}"),
    "mIoU": ("miou", "{:.3f}"),
    "probe": ("linear_top1", "{:.3f}"),
}
PANELS = {  # of the figure: title by metric
    "loss": "training loss",
    "knn_top1": "k-NN top-1",
    "rankme": "RankMe (effective rank)",
    "top1": "top-1",
    "miou": "mIoU",
    "images_per_second": "images per second",
}
LINE_STYLES = (":", "--", "-.")  # of the yardsticks


@dataclass(frozen=True)
class Run:
    """What a workdir holds of a run, finished or not.

    Args:
      rows: of metrics.jsonl.
      config: by key, as "optim.base_lr".
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of a metric."""
        points = [(row["epoch"], row[metric]) for row in self.rows if metric in row]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, metric: str) -> float | None:
        """Return the latest value of a metric."""
        values = self.curve(metric)[1]
        return values[-1] if values else None

    @property
    def yardsticks(self) -> dict[str, float]:
        """Return the losses without a network, by name."""
        values = {name: self.last(f"yardstick_{name}") for name in DESCRIPTIONS}
        return {name: value for name, value in values.items() if value is not None}


def read_run(workdir: Path, name: str) -> Run:
    """Read a workdir, also while its run goes on; incomplete lines are ignored.

    Raises:
      UserError: it is no workdir of a run, or a file in it is damaged.
    """
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a folder: give the workdirs of runs")
    config = _read_json(workdir / "config.json")
    if config is None:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    rows = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # being written, or truncated when the run was killed
            continue
        if isinstance(row, dict) and {"step", "epoch"} <= row.keys():
            rows.append(row)
    return Run(name, rows, _read_json(workdir / "summary.json") or {}, flatten(config, sep="."))


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if there is no file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def result_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return column headings, and a row for each run; columns without any value are left out."""
    used = {
        heading: place
        for heading, place in COLUMNS.items()
        if any(run.last(place[0]) is not None for run in runs)
    }
    headings = ["run", "state", "step", "loss", "lowest", "images/s", *used]
    return headings, [_result_row(run, list(used.values())) for run in runs]


def _result_row(run: Run, places: Sequence[tuple[str, str]]) -> list[str]:
    losses, rates = run.curve("loss")[1], run.curve("images_per_second")[1]
    step = max((row["step"] for row in run.rows), default=0)
    finished = run.summary.get("steps", -1) >= step  # not if the run was continued since
    lowest = min((loss for loss in losses if np.isfinite(loss)), default=None)
    return [
        run.name,
        "finished" if finished else "unfinished",
        str(step),
        _format("{:.4f}", losses[-1] if losses else None),
        _format("{:.4f}", lowest),
        _format("{:,.0f}", float(np.median(rates)) if rates else None),
        *(_format(text, run.last(metric)) for metric, text in places),
    ]


def _format(text: str, value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else text.format(value)


def config_table(runs: Sequence[Run]) -> list[list[str]]:
    """Return key, value and runs with that value, for every key that is not the same in all."""
    rows = []
    for key in sorted({key for run in runs for key in run.config}):
        by_value: dict[str, list[str]] = {}
        for run in runs:
            by_value.setdefault(str(run.config.get(key, "-")), []).append(run.name)
        if len(by_value) > 1:
            for number, (value, names) in enumerate(by_value.items()):
                rows.append(["" if number else key, value, ", ".join(names)])
    return rows


def draw_curves(runs: Sequence[Run], out: Path) -> None:
    """Save a panel for every metric that some run has, over epochs.

    Raises:
      UserError: matplotlib is missing, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--out needs matplotlib: pip install matplotlib") from error
    metrics = [metric for metric in PANELS if any(run.curve(metric)[0] for run in runs)]
    if not metrics:
        raise UserError(f"--out {out}: no run has metrics to draw yet")
    figure = Figure(figsize=(4.2 * len(metrics), 3.6), layout="constrained")
    for axis, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics):
        curves = []
        for number, run in enumerate(runs):
            epochs, values = run.curve(metric)
            marker = "." if len(epochs) < 30 else ""
            curves += axis.plot(epochs, values, color=f"C{number}", marker=marker, label=run.name)
        axis.set_title(PANELS[metric], fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if metric == "loss":
            _draw_yardsticks(axis, runs)
    figure.legend(handles=curves, loc="outside lower center", ncols=4, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _draw_yardsticks(axis: Any, runs: Sequence[Run]) -> None:
    """Draw the yardsticks of the first run that has any, if they are the same in all."""
    known = [run.yardsticks for run in runs if run.yardsticks]
    if not known or any(other != known[0] for other in known):
        return
    lines = [
        axis.axhline(loss, color="gray", linestyle=style, linewidth=1, label=name.replace("_", " "))
        for (name, loss), style in zip(known[0].items(), LINE_STYLES)
    ]
    axis.legend(handles=lines, title="without a network", fontsize=7, title_fontsize=7)


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.out:
        cli.check_output("--out", arguments.out, ".png")
    paths = list(dict.fromkeys(arguments.runs))
    unique = len({path.name for path in paths}) == len(paths)
    runs = [read_run(path, path.name if unique and path.name else str(path)) for path in paths]
    console.print_table("runs", *result_table(runs))
    if differing := config_table(runs):
        console.print_table("config keys that differ", ["key", "value", "runs"], differing)
    elif len(runs) > 1:
        print("all runs have the same config")
    if arguments.out:
        draw_curves(runs, arguments.out)
        print(arguments.out)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.train.compare", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=cli.path_argument, metavar="WORKDIR", help="workdirs of runs"
    )
    parser.add_argument("--out", type=cli.path_argument, help="draw curves: .png")
    return parser


if __name__ == "__main__":
    cli.run_command(main)
