"""Ablations of the paper at toy scale: pretraining on the demo dataset, one setting at a time.

    python scripts/ablations.py --workdir runs/ablations

Every run is `train.py` with a row of configs/ablations.py, evaluated by `python -m
mae_jax.evaluate`. Finished runs are skipped, so the same command resumes. Cost is CPU time, which
does not depend on other load: machine-minutes are CPU seconds / 60 / number of cores. Writes
ablations.json and two figures to --out; results: docs/reports/ablations.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np

from mae_jax.utils.cli import path_argument, path_text

ROOT = Path(__file__).parent.parent
# Row of configs/ablations.py -> label in the table
ROWS = {
    "mask_ratio_25": "mask 25 %",
    "mask_ratio_50": "mask 50 %",
    "baseline": "mask 75 % (baseline)",
    "mask_ratio_90": "mask 90 %",
    "block_75": "block-wise 75 %",
    "grid_75": "grid 75 %",
    "pixels": "pixels, not normalized",
    "decoder_depth_2": "decoder depth 2",
    "decoder_depth_4": "decoder depth 4",
    "predict_50": "predict 50 % of the masked patches",
    "predict_25": "predict 25 % of the masked patches",
}
SEEDS = (0, 1)
CURVE = {450: (0, 1), 2250: (0,), 9000: (0,)}  # pretraining steps -> seeds
FINETUNED = ("random", "steps_450-s0", "steps_2250-s0", "steps_9000-s0")
FINETUNE_STEPS = 300
COST = "processor_seconds.json"  # CPU time of a run, in its workdir


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workdir", type=path_argument, default=Path("runs/ablations"))
    parser.add_argument(
        "--data-dir", type=path_text, default="datasets", help="TFDS folder of photo_crops"
    )
    parser.add_argument("--out", type=path_argument, help="folder of the results (WORKDIR)")
    arguments = parser.parse_args(argv)
    runs = [(f"{row}-s{seed}", row, seed, None) for seed in SEEDS for row in ROWS]
    runs += [
        (f"steps_{steps}-s{seed}", "baseline", seed, steps)
        for steps, seeds in CURVE.items()
        for seed in seeds
    ]
    for name, row, seed, steps in runs:
        overrides = [] if steps is None else [f"--config.steps={steps}"]
        config = f"configs/ablations.py:demo,{row}"
        train(arguments, name, config, [f"--config.seed={seed}", *overrides])
        evaluate(arguments, name, str(arguments.workdir / name))
    evaluate_random(arguments)
    for name in FINETUNED:
        start = name if name == "random" else str(arguments.workdir / name)
        overrides = [f"--config.init.path={start}", f"--config.steps={FINETUNE_STEPS}"]
        overrides += ["--config.eval.accuracy_every_epochs=0.0"]
        train(arguments, f"finetune_{name}", "configs/demo.py:finetune", overrides)
    report = collect(arguments)
    out = arguments.out or arguments.workdir
    out.mkdir(parents=True, exist_ok=True)
    (out / "ablations.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, out)
    print(table(report))


def train(arguments: argparse.Namespace, name: str, config: str, overrides: list[str]) -> None:
    """Run train.py, unless the run is finished."""
    workdir = arguments.workdir / name
    if (workdir / "summary.json").exists():
        return
    data = f"--config.data.path={arguments.data_dir}"
    command = ["train.py", "--config", config, "--workdir", str(workdir), data, *overrides]
    run_timed(workdir, command)


def evaluate(arguments: argparse.Namespace, name: str, checkpoint: str) -> None:
    """Evaluate k-NN and linear probe on the full dataset, unless the result exists."""
    out = arguments.workdir / name / "evaluate.json"
    if not out.exists():
        command = ["-m", "mae_jax.evaluate", "--checkpoint", checkpoint, "--data", "photo_crops"]
        command += ["--data-dir", arguments.data_dir, "--eval-split", "test", "--out", str(out)]
        run_timed(out.parent, command)


def evaluate_random(arguments: argparse.Namespace) -> None:
    """Evaluate random encoders and raw pixels, by a run of one step."""
    overrides = ["--config.steps=1", "--config.optim.warmup_steps=0", "--config.eval.linear=True"]
    overrides += ["--config.eval.baselines=True", "--config.eval.knn_bank=100000"]
    train(arguments, "baselines", "configs/ablations.py:demo,baseline", overrides)


def run_timed(workdir: Path, command: list[str]) -> None:
    """Run a command, and add its CPU time to that of the run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (workdir / COST).write_text(json.dumps(_read(workdir / COST, 0.0) + spent))


def _read(path: Path, default: Any = None) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all results by run."""
    runs = {}
    for workdir in sorted(path.parent for path in arguments.workdir.glob("*/summary.json")):
        summary = json.loads((workdir / "summary.json").read_text())
        result = {
            name: value
            for name, value in summary.items()
            if name.startswith(("top", "knn", "linear", "final_loss", "steps"))
        }
        for row in _read(workdir / "evaluate.json", {"results": []})["results"]:
            if row["measure"] in ("k-NN, k = 10", "linear probe"):
                result[f"{row['measure'].split(',')[0]} {row['features']}"] = row["top1"]
        runs[workdir.name] = result | {"processor_seconds": _read(workdir / COST)}
    seconds = sum(run["processor_seconds"] or 0.0 for run in runs.values())
    cores = len(os.sched_getaffinity(0))
    return {
        "command": "python scripts/ablations.py",
        "machine": platform.machine(),
        "cores": cores,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "machine_minutes": round(seconds / 60 / cores, 1),
        "runs": runs,
    }


def values(report: dict[str, Any], row: str, measure: str, seeds: tuple[int, ...]) -> np.ndarray:
    """Return a measure of a row, one value per seed."""
    return np.array([report["runs"][f"{row}-s{seed}"][measure] for seed in seeds])


def table(report: dict[str, Any]) -> str:
    """Return the ablations as a Markdown table: mean over the seeds, and each seed."""
    lines = ["| | k-NN | linear probe |", "|---|---|---|"]
    for row, label in ROWS.items():
        cells = []
        for measure in ("k-NN mean", "linear probe mean"):
            accuracy = values(report, row, measure, SEEDS)
            each = ", ".join(f"{x:.3f}" for x in accuracy)
            cells.append(f"{accuracy.mean():.3f} ({each})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], folder: Path) -> None:
    """Save ablations.png, a point per seed, and curve.png, accuracy against minutes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, measure in zip(axes, ("k-NN mean", "linear probe mean")):
        for place, row in enumerate(reversed(ROWS)):
            accuracy = values(report, row, measure, SEEDS)
            axis.plot(accuracy, [place] * len(accuracy), "o", color="tab:blue")
        baseline = values(report, "baseline", measure, SEEDS).mean()
        axis.axvline(baseline, color="gray", linestyle=":")
        axis.set_xlabel(f"top-1, {measure.removesuffix(' mean')}")
    axes[0].set_yticks(range(len(ROWS)), list(ROWS.values())[::-1])
    figure.savefig(folder / "ablations.png", dpi=110)

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    baselines = report["runs"]["baselines"]
    seconds = [report["runs"][f"steps_{steps}-s0"]["processor_seconds"] for steps in CURVE]
    minutes = [s / 60 / report["cores"] for s in seconds]
    for number, (measure, name) in enumerate(
        (("k-NN mean", "knn"), ("linear probe mean", "linear"))
    ):
        accuracy = [
            values(report, f"steps_{s}", measure, seeds).mean() for s, seeds in CURVE.items()
        ]
        color = f"C{number}"
        axis.plot(minutes, accuracy, "o-", color=color, label=measure.removesuffix(" mean"))
        axis.axhline(baselines[f"{name}_top1_random_init"], color=color, linestyle="--")
        axis.axhline(baselines[f"{name}_top1_pixels"], color=color, linestyle=":")
    axis.set_xscale("log")
    axis.set_xticks(minutes, [f"{m:.0f}" for m in minutes])
    axis.minorticks_off()
    axis.set_xlabel("minutes of pretraining on two cores (dashed: random encoder, dotted: pixels)")
    axis.set_ylabel("top-1")
    axis.legend()
    figure.savefig(folder / "curve.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
