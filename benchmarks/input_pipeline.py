"""Input pipeline: loaders beside torchvision and tf.data; loader, train step, and both together.

    pip install torch torchvision tensorflow-cpu     # loaders that are not installed are left out
    python -m benchmarks.input_pipeline --folder JPEGS [--size vit_b16 --batch 256 --dtype bf16]

Loaders: every run is a process of its own that decodes, crops (random resized crop), resizes to
224 x 224 and flips; runs are interleaved, medians are printed. CPU time covers the process and its
children, so it does not depend on other load. For mae_jax (device) only the host's part is timed.

Training: loader, step and prefetcher are those of train.py with configs/pretrain.py. In every round
the loader runs alone (batches go to the device and are dropped), the step runs alone (on batches
that are on the device), and both run together. The first steps of each are not timed.
"""

import argparse
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.environment import environment, versions
from benchmarks.interleaved import Stopwatch, round_orders
from benchmarks.loaders import BASELINE, compare_loaders, list_files
from benchmarks.loaders import BATCH as LOADER_BATCH
from configs import pretrain
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.train_step import init_state
from mae_jax.train import build_data
from mae_jax.train.config import Config, from_config_dict
from mae_jax.train.init_state import split_rng
from mae_jax.train.loop import make_prefetcher
from mae_jax.train.setup import build, make_step, select_attention
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cli import check_output, make_parser, path_argument, positive_int, run_command
from mae_jax.utils.console import print_table, progress
from mae_jax.utils.errors import UserError

WARM_UP = 3  # steps before timing starts, which use up what was prefetched
DTYPES = {"f32": "float32", "bf16": "bfloat16"}
RESIZERS, PARTS = ("host", "device"), ("loader", "step", "both")
PACKAGES = ("jax", "flax", "grain", "simplejpeg", "pillow", "pillow-simd", "torch", "torchvision")
PACKAGES += ("tensorflow-cpu", "tensorflow")


class TrainLoop:
    """The loader and the train step of a run, and its state."""

    def __init__(self, config: Config, workdir: Path):
        setup = select_attention(build(config, workdir))
        init = functools.partial(init_state, setup.task, setup.tx)
        self.setup, self.step = setup, make_step(setup)
        self.state = jax.jit(init, out_shardings=setup.layout.shardings)(split_rng(config.seed)[0])

    def time(self, part: str, steps: int) -> dict[str, float]:
        """Return the rates of one of PARTS over `steps` steps; data_wait: share of waiting."""
        loader = self.setup.loader
        assert loader
        prefetcher = make_prefetcher(loader, 0, self.setup.mesh, lambda _: None)
        with closing(prefetcher) as batches:
            if part == "step":
                batches = itertools.cycle(list(itertools.islice(batches, 2)))
            previous, waited, stopwatch = None, 0.0, Stopwatch()
            for number in range(WARM_UP + steps):
                if number == WARM_UP:
                    waited, stopwatch = 0.0, Stopwatch()
                start = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - start
                if part == "loader":
                    jax.block_until_ready(batch)
                    continue
                self.state, metrics = self.step(self.state, batch)
                jax.device_get(previous)  # one step late, as in train.py
                previous = metrics
            jax.device_get(previous)
            took = stopwatch.read()
        images = steps * self.setup.config.batch_size
        return {
            "images_per_s": images / took["wall"],
            "cpu_ms": 1e3 * took["cpu"] / images,
            "data_wait": min(waited / took["wall"], 1.0),
        }


def compare_training(config: Any, workdir: Path, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for resizing on the host and one for resizing on the device."""
    rows = []
    for resizer in RESIZERS:
        config.data.resize_on = resizer
        loop = TrainLoop(from_config_dict(config), workdir / resizer)
        order = [part for parts in round_orders(PARTS, rounds) for part in parts]
        runs: dict[str, list[dict[str, float]]] = {part: [] for part in PARTS}
        for part in progress(order, len(order), "runs"):
            runs[part].append(loop.time(part, steps))
        hint = build_data.input_bound_hint(loop.setup.config, loop.setup.resize_on_device)
        rows.append({"resize_on": resizer} | summarize(runs, hint))
    return rows


def summarize(runs: dict[str, list[dict[str, float]]], hint: str) -> dict[str, Any]:
    """Return medians by part, the bottleneck, and "overlap": both over the slower one alone."""
    middle = lambda part, key: round(median(run[key] for run in runs[part]), 4)
    speeds = [[run["images_per_s"] for run in runs[part]] for part in PARTS]
    overlap = median(both / min(loader, step) for loader, step, both in zip(*speeds))
    names = ("images_per_s", "cpu_ms")
    row: dict[str, Any] = {key: {part: middle(part, key) for part in PARTS} for key in names}
    loader, step = row["images_per_s"]["loader"], row["images_per_s"]["step"]
    limit, faster = ("loader", "step") if loader < step else ("step", "loader")
    factor = max(loader, step) / min(loader, step)
    verdict = f"the {limit} is the bottleneck: the {faster} alone is {factor:.1f} times as fast"
    verdict += f". What helps: {hint}" if limit == "loader" else ""
    wait = middle("both", "data_wait")
    return row | {
        "overlap": round(overlap, 4),
        "data_wait": wait,
        "limit": limit,
        "verdict": verdict,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print both tables and the bottlenecks."""
    columns = ("name", "images_per_s", "cpu_us", "ratio")
    rows = [[row[column] for column in columns] for row in report["loaders"]]
    title = f"{report['files']} files of {report['mean_kb']} KB, {report['threads']} threads"
    print_table(title, ("", "images/s", "CPU us/image", "ratio"), rows)
    print(f"ratio: CPU time of '{BASELINE}' over that of the row.")
    rows = []
    for row in report["training"]:
        cells = [f"{row['images_per_s'][part]:.1f}" for part in PARTS]
        costs = [f"{row['cpu_ms'][part]:.1f}" for part in PARTS]
        rows.append([row["resize_on"], *cells, f"{row['overlap']:.2f}", *costs])
    title = f"images/s of {report['size']}, batch {report['batch']} in {report['dtype']}"
    columns = ("resized on", *PARTS, "overlap", *(f"CPU ms, {part}" for part in PARTS))
    print_table(f"{title}, {report['device']}", columns, rows)
    for row in report["training"]:
        print(f"{row['resize_on']}: {row['verdict']}.")


def make_report(args: argparse.Namespace, config: Any, root: Path) -> dict[str, Any]:
    """Run both comparisons; runs of the trainer are set up in `root`."""
    folder = args.folder
    sizes = [path.stat().st_size for path in list_files(folder)]
    if len(sizes) < (needed := max(args.batch, LOADER_BATCH)):
        raise UserError(f"{folder} has {len(sizes)} images, fewer than a batch of {needed}")
    config.data.update(source="folder", path=str(folder), threads=args.threads)
    config.data.update(workers=args.workers)
    config.batch_size = args.batch
    loaders = compare_loaders(folder, args.threads, args.rounds, args.images)
    training = compare_training(config, root, args.steps, args.rounds)
    flags = {name: value for name, value in vars(args).items() if name not in ("folder", "json")}
    return {
        **environment(),
        "versions": versions(PACKAGES),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **flags,
        "files": len(sizes),
        "mean_kb": round(sum(sizes) / len(sizes) / 1e3, 1),
        "loaders": loaders,
        "training": training,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.input_pipeline", __doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--folder", type=path_argument, required=True, help="JPEGs")
    add("--threads", type=positive_int, default=os.cpu_count(), help="or processes (all cores)")
    add("--workers", type=int, default=0, help="data.workers in training (0)")
    add("--rounds", type=positive_int, default=3)
    add("--images", type=positive_int, default=1024, help="per round of a loader (1024)")
    add("--size", choices=VARIANTS, default="vit_s16")
    add("--batch", type=positive_int, default=64, help="images (64)")
    add("--dtype", choices=DTYPES, default="f32", help="of activations (f32)")
    add("--steps", type=positive_int, default=20, help="per round of training (20)")
    add("--json", type=path_argument, help="output file")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.json:
        check_output("--json", args.json, ".json")
    config = pretrain.get_config(args.size)
    config.model.dtype = DTYPES[args.dtype]
    with tempfile.TemporaryDirectory() as root:
        report = make_report(args, config, Path(root))
    print_report(report)
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    run_command(main)
