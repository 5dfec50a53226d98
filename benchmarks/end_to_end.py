"""What limits a run that trains from files: reading them, or the step. Each alone, and both.

    python -m benchmarks.end_to_end [--folder DIR] [--size vit_s16] [--batch 64] [--json FILE.json]
    python -m benchmarks.end_to_end --folder DIR --size vit_b16 --batch 256 --dtype bf16    # a GPU

Takes images from a folder of JPEGs (of DIR, or made like ImageNet's), and from an array_record data
set of the same, with crops resized by the host and by the device. Reading, step and loop are those
of train.py with configs/pretrain.py. Three turns alternate in every round: the loader alone, whose
batches go to the device and are dropped; the step alone, on batches that are there already; and
both, as a run has them. Medians of the rounds are shown.

In a turn the first steps are not counted, and compiling is told apart. Files are few enough to stay
in the memory of the operating system: a slow disk shows only with --files beyond that.

Exits with 2 for a folder without JPEGs, and for one that does not fill a batch.
"""

import argparse
import dataclasses
import itertools
import logging
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from mae_jax.utils.cli import check_output, positive_int

from benchmarks.data import make_folder
from benchmarks.machine import environment, versions
from benchmarks.turns import TURNS, Taken, Trainer
from configs import pretrain
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.downscale import DownscaledDataset, DownscaleJpeg, write_dataset
from mae_jax.data.loader import available_cpus
from mae_jax.data.sources import DataError, FileSource, FolderSource
from mae_jax.data.validation import validate_images
from mae_jax.data.worker_processes import WorkerError
from mae_jax.models.variants import VARIANTS
from mae_jax.train import Config, build_data
from mae_jax.train.init_state import ConfigError
from mae_jax.train.parts import RunSetup, build, choose_attention
from mae_jax.utils import console
from mae_jax.utils.atomic import write_json

DTYPES = {"f32": "float32", "bf16": "bfloat16"}
SOURCES, RESIZERS = ("folder", "array_record"), ("host", "device")
HELD_BACK = 0.9  # of the slower one's speed alone, below which the two hold each other up
NAME = "images"  # of the array_record data set
JPEGS = (".jpg", ".jpeg")
WHOLE = 2**16  # pixels, as many as a JPEG's side can have: the copy keeps every file as it is
PACKAGES = ("jax", "jaxlib", "flax", "grain", "array_record", "tensorflow-datasets", "simplejpeg")
PACKAGES += ("pillow", "pillow-simd")
Case = tuple[str, str]  # source, and where crops are resized
Rounds = dict[str, list[Taken]]  # by turn


# The two data sets


def make_data_sets(root: Path, folder: Path | None, files: int, least: int) -> dict[str, Path]:
    """By source: links to at most so many JPEGs of a folder, or new ones, and the same as TFDS has.

    Raises:
      DataError: there are fewer than the least.
      ModuleNotFoundError: what new ones are made of is not installed.
    """
    images = root / "folder"
    images.mkdir()
    chosen = _chosen(folder, files) if folder else []
    there = len(chosen) if folder else files
    if there < least:
        raise DataError(f"--batch {least} is larger than the {there} good JPEGs to read")
    if folder:
        for number, path in enumerate(chosen):
            (images / f"{number:07d}_{path.name}").symlink_to(path.absolute())
    else:
        make_folder(images, files)
    with _temporary_in(root):
        _write_copy(FolderSource(str(images), "train"), root / "array_record")
    return {"folder": images, "array_record": root / "array_record"}


@contextmanager
def _temporary_in(root: Path) -> Iterator[None]:
    """Temporary folders are made there; TFDS leaves some behind."""
    before, tempfile.tempdir = tempfile.tempdir, str(root)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _write_copy(source: FolderSource, folder: Path) -> None:
    """The same files as array_record."""
    shrink = DownscaleJpeg(3, WHOLE, 90)
    write_dataset(
        DownscaledDataset(
            NAME, folder, {"train": source}, shrink, threads=available_cpus(), skip=False
        )
    )


def _chosen(folder: Path, files: int) -> list[Path]:
    """At most so many JPEGs of a folder, evenly spaced, and of these the good ones."""
    found = [path for path in FileSource([folder]).files if path.suffix.lower() in JPEGS]
    if not found:
        raise DataError(f"no JPEGs in {folder} (files that end in {' or '.join(JPEGS)})")
    numbers = np.linspace(0, len(found) - 1, min(files, len(found))).round().astype(int)
    source = FileSource([found[number] for number in numbers])
    bad = validate_images(source, 3, available_cpus()).bad
    return [path for number, path in enumerate(source.files) if source.key(number) not in bad]


def make_run(config: Config, case: Case, folder: Path) -> RunSetup:
    """The parts of a run on one of the data sets, as train.py has them."""
    source, resize_on = case
    config = config.copy_and_resolve_references()
    kind = "folder" if source == "folder" else "tfds"
    config.data.update(source=kind, name=NAME, path=str(folder), eval_split="train")
    config.data.resize_on = resize_on
    return build(config, folder.parent / f"run_{source}_{resize_on}")


# All of them


def compare(
    config: Config, folders: dict[str, Path], steps: int, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each case, and by resizer how long the first step took, with compiling.

    Args:
      config: of the runs, but for their data; folders: by source.
      steps: that count, in each turn.
    """
    cases = list(itertools.product(SOURCES, RESIZERS))
    runs = {case: make_run(config, case, folders[case[0]]) for case in cases}
    tuned = choose_attention(runs[cases[0]]).task
    runs = {case: dataclasses.replace(run, task=tuned) for case, run in runs.items()}
    trainers = {
        resizer: Trainer(runs[SOURCES[0], resizer])
        for resizer in console.progress(RESIZERS, len(RESIZERS), "programs")
    }
    order = np.random.default_rng(0)
    turns = [
        (cases[number], list(TURNS)[turn])
        for _ in range(rounds)
        for number in order.permutation(len(cases))
        for turn in order.permutation(len(TURNS))
    ]
    taken: dict[Case, Rounds] = {case: {turn: [] for turn in TURNS} for case in cases}
    for case, turn in console.progress(turns, len(turns), "turns"):
        taken[case][turn].append(TURNS[turn](trainers[case[1]], runs[case], steps))
    rows = []
    for case in cases:
        row = {"source": case[0], "resize_on": case[1]} | summary(taken[case])
        advice = build_data.input_bound_hint(runs[case].config, runs[case].on_device)
        rows.append(row | {"verdict": verdict(row, advice)})
    return rows, {name: round(trainer.first_step_s, 1) for name, trainer in trainers.items()}


def summary(taken: Rounds) -> dict[str, Any]:
    """Medians of the rounds.

    images_per_s, cpu_ms, others: by turn. in_turns: images per second if the loader and the step
    never worked at the same time. overlap: the speed of both over that of the slower one alone;
    overlaps: of each round. limit: the slower one.
    """
    middle = lambda turn, key: round(median(each[key] for each in taken[turn]), 4)
    speeds = [[each["images_per_s"] for each in taken[turn]] for turn in TURNS]
    in_turns = [1 / (1 / loader + 1 / step) for loader, step, _ in zip(*speeds)]
    overlaps = [both / min(loader, step) for loader, step, both in zip(*speeds)]
    loader, step = middle("loader", "images_per_s"), middle("step", "images_per_s")
    by_turn = ("images_per_s", "cpu_ms", "others")
    return {
        **{key: {turn: middle(turn, key) for turn in TURNS} for key in by_turn},
        "in_turns": round(median(in_turns), 4),
        "overlap": round(median(overlaps), 4),
        "overlaps": [round(overlap, 4) for overlap in overlaps],
        "data_wait": middle("both", "data_wait"),
        "data_ready": middle("both", "data_ready"),
        "limit": "loader" if loader < step else "step",
    }


def verdict(row: dict[str, Any], advice: str) -> str:
    """What limits a case, and what helps; `advice` is for where reading does."""
    speed, spent = row["images_per_s"], row["cpu_ms"]
    if row["limit"] == "step":
        ahead = speed["loader"] / speed["step"]
        said = f"the step is the limit: the loader alone is {ahead:.1f} times as fast"
    else:
        ahead = speed["step"] / speed["loader"]
        said = f"the loader is the limit: the step alone is {ahead:.1f} times as fast"
        said += f". What helps: {advice}"
    if jax.default_backend() == "cpu":
        share = spent["loader"] / (spent["loader"] + spent["step"])
        said += f". Both share {available_cpus()} cores, and reading takes {share:.0%} of what they spend"
    elif row["overlap"] < HELD_BACK:
        said += f". Together they reach only {row['overlap']:.0%} of the slower one's speed: "
        said += "data.workers=2 or more, which read in processes of their own, may help"
    return said


def show(report: dict[str, Any]) -> None:
    """Prints the tables and the verdicts."""
    rows = report["rows"]
    speeds, costs = [], []
    for row in rows:
        case, speed, runs = (row["source"], row["resize_on"]), row["images_per_s"], row["overlaps"]
        numbers = [*(speed[turn] for turn in TURNS), row["in_turns"]]
        overlap = f"{row['overlap']:.2f} ({min(runs):.2f}-{max(runs):.2f})"
        speeds.append([*case, *(f"{number:.1f}" for number in numbers), overlap])
        waits = f"{row['data_wait']:.1%}", f"{row['data_ready']:.2f}"
        costs.append([*case, *(f"{row['cpu_ms'][turn]:.1f}" for turn in TURNS), *waits])
    title = f"{report['size']}, batch {report['batch']} in {report['dtype']}, {report['device']}"
    columns = ("images", "on", *TURNS, "in turns", "overlap")
    console.print_table(f"images/s: {title}", columns, speeds)
    print(
        "on: where crops are resized; in turns: if loader and step never worked at the same time;"
    )
    print("overlap: both over the slower one alone (least and most of the rounds).")
    if report["shared_cores"]:
        print(
            f"Loader and step compute on the same {report['cores']} cores: where each alone keeps "
            "them busy,\n'in turns' is the most that both can do, and overlap stays below 1."
        )
    columns = ("images", "on", *TURNS, "data_wait", "data_ready")
    console.print_table("CPU ms per image, and the waiting of both", columns, costs)
    others = max(value for row in rows for value in row["others"].values())
    print(f"Other programs kept up to {others:.1f} of {report['cores']} cores busy meanwhile.")
    compiled = ", ".join(f"{value:.1f} s ({name})" for name, value in report["first_step"].items())
    print(f"Not counted above: the first step, with compiling, took {compiled}.\n")
    for row in rows:
        print(f"{row['source']}, {row['resize_on']}: {row['verdict']}.")


def make_config(arguments: argparse.Namespace) -> Config:
    """The paper's pretraining, as the arguments ask for it."""
    config: Config = pretrain.get_config(arguments.size)
    config.batch_size = arguments.batch
    config.model.dtype = DTYPES[arguments.dtype]
    config.data.update(threads=arguments.threads, workers=arguments.workers)
    return config


def make_report(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, and on what.

    Raises:
      ConfigError, DataError, ModuleNotFoundError: a flag or the data is not as it should be.
    """
    with tempfile.TemporaryDirectory() as root:
        folders = make_data_sets(Path(root), arguments.folder, arguments.files, arguments.batch)
        sizes = [path.stat().st_size for path in folders["folder"].iterdir()]
        rows, first_step = compare(config, folders, arguments.steps, arguments.rounds)
    workers, threads = build_data.worker_counts(config)
    return {
        "command": "python -m benchmarks.end_to_end " + shlex.join(sys.argv[1:]),
        **environment(),
        "versions": versions(PACKAGES),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "shared_cores": jax.default_backend() == "cpu",
        **{
            name: getattr(arguments, name) for name in ("size", "batch", "dtype", "steps", "rounds")
        },
        "files": len(sizes),
        "mean_kb": round(sum(sizes) / len(sizes) / 1e3, 1),
        "workers": workers,
        "threads": threads,
        "first_step": first_step,
        "rows": rows,
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of JPEGs; made unless given")
    parser.add_argument(
        "--files", type=positive_int, default=1000, help="to make, or to take of the folder (1000)"
    )
    parser.add_argument("--size", choices=VARIANTS, default="vit_s16")
    parser.add_argument("--batch", type=positive_int, default=64, help="images (64)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of activations")
    parser.add_argument(
        "--steps", type=positive_int, default=20, help="that count, in each turn (20)"
    )
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--threads", type=positive_int, help="data.threads")
    parser.add_argument("--workers", type=int, default=0, help="data.workers (0)")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    try:
        if arguments.json:
            check_output("--json", arguments.json, ".json")
        report = make_report(make_config(arguments), arguments)
    except (ConfigError, ConvertError, DataError, ModuleNotFoundError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(report)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    console.setup_logging()
    console.log.setLevel(logging.ERROR)  # the copy of the data is no original, as is known here
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which removes the data sets
    main(sys.argv[1:])
