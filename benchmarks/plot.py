"""A picture of what `benchmarks.step` has measured: images per second, and ratios on the bars.

python -m benchmarks.plot benchmarks/results/step_*.json --out docs/step.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

Report = dict[str, Any]
OURS = "mae_jax"
COLOURS = {OURS: "tab:blue", "hf": "tab:orange", "timm": "tab:green", "official": "tab:red"}
PANELS_IN_A_ROW = 3
LIGHT = 0.55  # opacity of what torch.compile has compiled


def setting(report: Report) -> str:
    """What was measured, and on what."""
    flags, device = report["flags"], report["workers"][OURS]["device"]
    if report["workers"][OURS]["platform"] == "cpu":
        device = f"{report['environment']['cores']} cores of {report['environment']['processor']}"
    return f"{flags['task']} {flags['size']}, batch {flags['batch']}, {flags['dtype']}\n{device}"


def draw(reports: list[Report], out: Path) -> None:
    """A panel of bars for every report."""
    mpl.use("Agg")
    bars = max(len(report["rows"]) for report in reports)
    columns = min(len(reports), PANELS_IN_A_ROW)
    rows = -(-len(reports) // columns)
    size = (1.0 + 0.8 * bars) * columns, 3.0 * rows + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(reports) :]:
        axis.set_visible(False)
    for axis, report in zip(axes.flat, reports):
        draw_bars(axis, report["rows"])
        axis.set_title(setting(report), fontsize=8)
        axis.set_xlim(-0.6, bars - 0.4)  # bars of all panels are equally wide
    figure.supxlabel("1.2x: its step takes 1.2 times as long as that of mae_jax", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def draw_bars(axis: Any, rows: list[Report]) -> None:
    """Images per second, and above a peer's bar its ratio to mae_jax."""
    for place, row in enumerate(rows):
        name, speed = row["implementation"], row["images_per_s"]
        opacity = LIGHT if name.endswith("_compile") else 1.0
        bar = axis.bar(place, speed, color=COLOURS[name.removesuffix("_compile")], alpha=opacity)
        text = f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}"
        text += f"\n{row['ratio']['median']:.2f}x" if "ratio" in row else ""
        axis.bar_label(bar, [text], padding=2, fontsize=8)
    names = [row["implementation"].replace("_compile", "\ncompile") for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=8)
    axis.set_ylabel("images/s", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.margins(y=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def read(path: Path) -> Report:
    """A complete report; ValueError for any other file."""
    try:
        report = json.loads(path.read_text())
        complete = report["status"] == "complete"
        if complete:
            _ = setting(report), [row["images_per_s"] for row in report["rows"]]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of benchmarks.step --json") from error
    if not complete:
        raise ValueError(f"{path} is not complete: it ends at {report['status']!r}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="of benchmarks.step --json")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    arguments = parser.parse_args()
    try:
        draw([read(path) for path in arguments.results], arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
