"""What predicting a part of the masked patches saves: processor time of a train step, side by side.

    python -m benchmarks.predict_ratio [--json benchmarks/results/predict_ratio.json]

All ratios train one state in one process, a step each in turn, so that other work on the machine
meets them alike. Ratios are of processor seconds, to those of the whole prediction in the same
round: their median, and the least and the largest. Images are random, parameters float32.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import flags, machine
from configs import ablations, pretrain
from mae_jax.distributed import sharding
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.train_step import init_state, jit_step, make_train_step
from mae_jax.train import Config, build_model
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_table, progress

RATIOS = (1.0, 0.5, 0.25)
ROUNDS = {"demo": 20, "vit_s16": 5, "vit_b16": 3}  # of each model


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args()
    flags.check_json(parser, arguments)
    rows = []
    report = {
        "command": "python -m benchmarks.predict_ratio",
        "environment": machine.environment(),
        "versions": machine.versions(("jax",)),
        "rows": rows,
    }
    for model in ROUNDS:
        rows += measure(model)
        report["load"] = os.getloadavg()[0]  # processes that ran or waited, in the last minute
        if arguments.json:
            write_json(arguments.json, report)
    show(report)


def config_of(model: str) -> Config:
    """The ablations' model at their batch size, or one of the paper's at a batch of 8."""
    if model == "demo":
        return ablations.get_config("demo,baseline")
    config = pretrain.get_config(model)
    config.batch_size = 8
    config.model.dtype = "float32"
    return config


def measure(model: str) -> list[dict[str, Any]]:
    """A row for each ratio of a model."""
    config, rounds = config_of(model), ROUNDS[model]
    whole = build_model.make_task(config, sharding.make_mesh(), ())
    parts = {ratio: dataclasses.replace(whole, predict_ratio=ratio) for ratio in RATIOS}
    rate = warmup_cosine(peak=1e-4, warmup_steps=10, total_steps=1000)
    tx = adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    key = jax.random.key(0)
    state = jax.jit(lambda key: init_state(whole, tx, key))(key)
    steps: dict[float, Callable[..., Any]] = {
        ratio: jit_step(make_train_step(part, tx, rate, key)) for ratio, part in parts.items()
    }
    shape = (config.batch_size, *config.model.image_size, 3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    seconds: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}
    for number in progress(range(rounds + 1), rounds + 1, f"rounds of {model}"):
        for ratio, step in steps.items():
            begin = time.process_time()
            state, _ = jax.block_until_ready(step(state, batch))
            if number:  # the first compiles
                seconds[ratio].append(time.process_time() - begin)
    counts = {ratio: build_model.flops_per_image(config, part) for ratio, part in parts.items()}
    return [
        {
            "model": model,
            "batch": config.batch_size,
            "rounds": rounds,
            "predict_ratio": ratio,
            "predicted": part.num_predicted,
            "masked": part.num_masked,
            "processor_seconds": float(np.median(seconds[ratio])),
            "ratios": sorted(np.divide(seconds[ratio], seconds[1.0]).tolist()),
            "flops": counts[ratio] / counts[1.0],
        }
        for ratio, part in parts.items()
    ]


def show(report: dict[str, Any]) -> None:
    """A table for people."""
    lines = [
        (
            row["model"],
            row["batch"],
            f"{row['predicted']} of {row['masked']}",
            f"{row['processor_seconds']:.2f}",
            f"{np.median(row['ratios']):.2f}",
            f"{row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f}",
            f"{row['flops']:.2f}",
        )
        for row in report["rows"]
    ]
    columns = ("model", "batch", "predicted", "CPU s", "ratio", "least to largest", "FLOPs")
    print_table(f"A train step on {report['environment']['processor']}", columns, lines)


if __name__ == "__main__":
    main()
