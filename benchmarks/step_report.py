"""From the raw values of `benchmarks.step` to its tables."""

import argparse
import math
import sys
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from mae_jax.models import flops
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.console import print_table

NOISY = 0.2  # cores that others keep busy
KEPT = 0.25  # of the patches
OURS = "mae_jax"
IMAGE_SIZE = 224
Report = dict[str, Any]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most."""
    lower, middle, upper = (
        quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {"median": middle, "q1": lower, "q3": upper, "min": min(values), "max": max(values)}


def ratios(rounds: Sequence[Report], name: str, clock: str) -> dict[str, float]:
    """A peer's time of a step over that of mae_jax, by "wall" or "cpu", round by round."""
    per_step = lambda burst: burst[clock] / burst["steps"]
    return spread([per_step(turn[name]) / per_step(turn[OURS]) for turn in rounds])


def image_flops(task: str, size_name: str, patches: int) -> float:
    """Of one image, in the paper's form."""
    size = VARIANTS[size_name]
    values = size.patch**2 * 3
    if task == "encode":
        return flops.encoder_flops(size, patches, patches, values)
    return flops.train_flops(size, patches, int(patches * KEPT), values)


def summarise(report: Report, arguments: argparse.Namespace) -> list[Report]:
    """A row for every implementation: its speed, and where it is a peer its ratios to mae_jax."""
    return [_row(report, arguments, name) for name in arguments.impl]


def _row(report: Report, arguments: argparse.Namespace, name: str) -> Report:
    rounds, check = report["rounds"], report["checks"][name]
    device = report["workers"][OURS]
    on_cpu = device["platform"] == "cpu"
    seconds = spread([turn[name]["wall"] / turn[name]["steps"] for turn in rounds])
    processor = [turn[name]["cpu"] / turn[name]["steps"] for turn in rounds]
    others = sum(turn[name]["others"] for turn in rounds) / len(rounds)
    patches = (IMAGE_SIZE // VARIANTS[arguments.size].patch) ** 2
    work = arguments.batch * image_flops(arguments.task, arguments.size, patches)
    speed, peak = work / seconds["median"], flops.peak_flops(device["device"])
    row = {
        "implementation": name,
        "first_s": check["first_s"],
        "steps_per_burst": rounds[0][name]["steps"],
        "step_s": seconds,
        "images_per_s": arguments.batch / seconds["median"],
        "model_flops_per_s": speed,
        "mfu_measured": speed / report["ceiling"]["flops_per_s"],
        "mfu_peak": speed / peak if peak and arguments.dtype == "bf16" else None,
        "peak_bytes": check["peak_bytes"],
        "cpu_s_per_step": median(processor) if on_cpu else None,
        "others_cores": others,
        "noisy": on_cpu and others > NOISY,
    }
    if name != OURS:
        row["ratio"] = ratios(rounds, name, "wall")
        row["cpu_ratio"] = ratios(rounds, name, "cpu") if on_cpu else None
    return row


def show(report: Report, arguments: argparse.Namespace) -> None:
    """Prints the speeds, then the ratios."""
    device, ceiling = report["workers"][OURS]["device"], report["ceiling"]
    on_cpu = report["workers"][OURS]["platform"] == "cpu"
    device = report["environment"]["processor"] if on_cpu else device
    title = f"{arguments.task} {arguments.size}, batch {arguments.batch}, {arguments.dtype}"
    columns = ("", "first s", "step ms", "images/s", "TFLOP/s", "MFU", "of peak", "GB")
    print_table(f"{title}, {device}", columns, map(_speeds, report["rows"]))
    print(
        f"MFU: of {ceiling['flops_per_s'] / 1e12:.3g} TFLOP/s, a product of {ceiling['matmul']}, "
        f"measured beside a copy of {ceiling['copy_bytes_per_s'] / 1e9:.3g} GB/s."
    )
    peers = [row for row in report["rows"] if "ratio" in row]
    if peers:
        columns = ("", "ratio", "quartiles", "range")
        columns += ("CPU ratio", "others' cores") if on_cpu else ()
        title = "Time of a step over that of mae_jax: above 1 mae_jax is faster"
        print_table(title, columns, (_ratio(row, on_cpu) for row in peers))
    if any(row["noisy"] for row in report["rows"]):
        names = ", ".join(row["implementation"] for row in report["rows"] if row["noisy"])
        print(f"noisy: other processes kept more than {NOISY} cores busy during {names}.")


def _speeds(row: Report) -> list[str]:
    share = lambda value: "" if value is None else f"{100 * value:.1f} %"
    return [
        row["implementation"],
        f"{row['first_s']:.1f}",
        f"{1e3 * row['step_s']['median']:.1f}",
        f"{row['images_per_s']:,.1f}",
        f"{row['model_flops_per_s'] / 1e12:.3g}",
        share(row["mfu_measured"]),
        share(row["mfu_peak"]),
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


def _ratio(row: Report, on_cpu: bool) -> list[str]:
    ratio = row["ratio"]
    between = lambda low, high: f"{ratio[low]:.2f} to {ratio[high]:.2f}"
    cells = [row["implementation"], f"{ratio['median']:.2f}"]
    cells += [between("q1", "q3"), between("min", "max")]
    if on_cpu:
        cells += [f"{row['cpu_ratio']['median']:.2f}", f"{row['others_cores']:.2f}"]
    return cells


def verdict(report: Report, min_ratio: float | None) -> int:
    """The exit status: 1 where numbers are not finite any more, or a ratio is below the least."""
    status = 0
    for row in report["rows"]:
        name = row["implementation"]
        if not math.isfinite(report["checks"][name]["last_loss"]):
            print(f"{name} ends with a loss that is no number", file=sys.stderr)
            status = 1
        ratio = row.get("ratio")
        if min_ratio and ratio and ratio["median"] < min_ratio:
            print(f"{name}: {ratio['median']:.3f}, below --min-ratio {min_ratio}", file=sys.stderr)
            status = 1
    return status
