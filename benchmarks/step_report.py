"""Tables and figure of `benchmarks.step`, from its raw timings.

python -m benchmarks.step_report docs/reports/data/step_*.json --out step.png
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.interleaved import per_step, ratios, spread
from mae_jax.models import flops
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.cli import make_parser, path_argument, run_command
from mae_jax.utils.console import print_table

KEEP_RATIO = 0.25  # of the patches
OURS = "mae_jax"
IMAGE_SIZE = 224
COLORS = {OURS: "tab:blue", "hf": "tab:orange", "timm": "tab:green", "official": "tab:red"}
Report = dict[str, Any]


def num_patches(size: str) -> int:
    """Return the number of patches of an image."""
    return (IMAGE_SIZE // VARIANTS[size].patch) ** 2


def image_flops(task: str, size: str) -> float:
    """Return the FLOPs of one image, in the paper's form."""
    variant, patches = VARIANTS[size], num_patches(size)
    values = variant.patch**2 * 3
    if task == "encode":
        return flops.encoder_flops(variant, patches, patches, values)
    return flops.train_flops(variant, patches, int(patches * KEEP_RATIO), values)


def summarize(report: Report, args: argparse.Namespace) -> list[Report]:
    """Return a row per implementation: its speed, and the ratios of peers to mae_jax."""
    return [_row(report, args, name) for name in args.impl]


def _row(report: Report, args: argparse.Namespace, name: str) -> Report:
    rounds, check, device = report["rounds"], report["checks"][name], report["workers"][OURS]
    on_cpu = device["platform"] == "cpu"
    seconds = spread([per_step(timings[name]) for timings in rounds])
    speed = args.batch * image_flops(args.task, args.size) / seconds["median"]
    peak = flops.peak_flops(device["device"])
    cpu = median([per_step(timings[name], "cpu") for timings in rounds])
    row = {
        "implementation": name,
        "first_s": check["first_s"],
        "steps_per_burst": rounds[0][name]["steps"],
        "step_s": seconds,
        "images_per_s": args.batch / seconds["median"],
        "model_flops_per_s": speed,
        "mfu_peak": speed / peak if peak and args.dtype == "bf16" else None,
        "peak_bytes": check["peak_bytes"],
        "cpu_s_per_step": cpu if on_cpu else None,
    }
    if name != OURS:
        row["ratio"] = ratios(rounds, name, OURS, "wall")
        row["cpu_ratio"] = ratios(rounds, name, OURS, "cpu") if on_cpu else None
    return row


def print_tables(report: Report, args: argparse.Namespace) -> None:
    """Print speeds and ratios."""
    device = report["workers"][OURS]
    on_cpu = device["platform"] == "cpu"
    where = report["environment"]["processor"] if on_cpu else device["device"]
    title = f"{args.task} {args.size}, batch {args.batch}, {args.dtype}, {where}"
    columns = ("", "first s", "step ms", "images/s", "TFLOP/s", "MFU", "GB")
    print_table(title, columns, map(_speed_cells, report["rows"]))
    if peers := [row for row in report["rows"] if "ratio" in row]:
        columns = ("", "ratio", "range", *(("CPU ratio",) if on_cpu else ()))
        title = "Time per step relative to mae_jax: above 1 mae_jax is faster"
        print_table(title, columns, (_ratio_cells(row, on_cpu) for row in peers))


def _speed_cells(row: Report) -> list[str]:
    return [
        row["implementation"],
        f"{row['first_s']:.1f}",
        f"{1e3 * row['step_s']['median']:.1f}",
        f"{row['images_per_s']:,.1f}",
        f"{row['model_flops_per_s'] / 1e12:.3g}",
        f"{row['mfu_peak']:.1%}" if row["mfu_peak"] else "",
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


def _ratio_cells(row: Report, on_cpu: bool) -> list[str]:
    ratio = row["ratio"]
    cells = [row["implementation"], f"{ratio['median']:.2f}"]
    cells.append(f"{ratio['min']:.2f} to {ratio['max']:.2f}")
    return [*cells, f"{row['cpu_ratio']['median']:.2f}"] if on_cpu else cells


def exit_code(report: Report, min_ratio: float | None) -> int:
    """Return 1, and print why, if a loss is NaN/Inf or a ratio is below the minimum."""
    failures = []
    for row in report["rows"]:
        name, ratio = row["implementation"], row.get("ratio")
        if not math.isfinite(report["checks"][name]["last_loss"]):
            failures.append(f"{name}: NaN/Inf loss after the last step")
        if min_ratio and ratio and ratio["median"] < min_ratio:
            failures.append(f"{name}: {ratio['median']:.3f}, below --min-ratio {min_ratio}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


# Figure


def draw(reports: Sequence[Report], out: Path) -> None:
    """Save bars of images per second, labeled with the ratio to mae_jax; one panel per report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(reports), 3.3), layout="constrained")
    for axis, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports):
        flags, rows = report["flags"], report["rows"]
        for place, row in enumerate(rows):
            name = row["implementation"]
            compiled, color = name.endswith("_compile"), COLORS[name.removesuffix("_compile")]
            alpha = 0.55 if compiled else 1.0
            bar = axis.bar(place, row["images_per_s"], color=color, alpha=alpha)
            label = f"{row['images_per_s']:,.3g}"
            label += f"\n{row['ratio']['median']:.2f}x" if "ratio" in row else ""
            axis.bar_label(bar, [label], padding=2, fontsize=8)
        axis.set_xticks(range(len(rows)), [row["implementation"] for row in rows], fontsize=8)
        title = f"{flags['task']} {flags['size']}, batch {flags['batch']}, {flags['dtype']}"
        axis.set_title(f"{title}\n{report['environment']['processor']}", fontsize=8)
        axis.set_ylabel("images/s", fontsize=8)
        axis.margins(y=0.25)
    figure.supxlabel("1.2x: a step takes 1.2 times as long as that of mae_jax", fontsize=8)
    figure.savefig(out, dpi=150)


def main(argv: list[str]) -> None:
    parser = make_parser("benchmarks.step_report", __doc__)
    parser.add_argument(
        "results", nargs="+", type=path_argument, help="outputs of benchmarks.step --json"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="figure, .png or .svg")
    args = parser.parse_args(argv)
    draw([json.loads(path.read_text()) for path in args.results], args.out)


if __name__ == "__main__":
    run_command(main)
