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
    widest = max(len(report["rows"]) for report in reports)
    size = (1.6 + 1.0 * widest) * min(len(reports), 3), 3.4 * -(-len(reports) // 3)
    figure, axes = plt.subplots(
        -(-len(reports) // 3), min(len(reports), 3), figsize=size, squeeze=False
    )
    for axis in axes.flat[len(reports) :]:
        axis.set_visible(False)
    for axis, report in zip(axes.flat, reports):
        draw_bars(axis, report)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def draw_bars(axis: Any, report: Report) -> None:
    """Images per second; above a peer's bar how many times as fast mae_jax is."""
    rows = report["rows"]
    for place, row in enumerate(rows):
        name, speed = row["implementation"], row["images_per_s"]
        opacity = LIGHT if name.endswith("_compile") else 1.0
        axis.bar(place, speed, color=COLOURS[name.removesuffix("_compile")], alpha=opacity)
        text = f"{speed:,.3g}" if speed < 1000 else f"{speed:,.0f}"
        if "ratio" in row:
            text += f"\n{row['ratio']['median']:.2f}x"
        axis.text(place, speed, text, ha="center", va="bottom", fontsize=8)
    axis.set_xticks(
        range(len(rows)), [row["implementation"].replace("_", "\n") for row in rows], fontsize=8
    )
    axis.set_title(setting(report), fontsize=8)
    axis.set_ylabel("images/s", fontsize=8)
    axis.margins(y=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def read(path: Path) -> Report:
    """A complete report; ValueError for any other file."""
    try:
        report = json.loads(path.read_text())
        complete = report["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of benchmarks.step: {error}") from error
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
