"""How fast images are read, cropped and resized, beside torchvision and tf.data, and how exactly.

    pip install torch torchvision tensorflow-cpu     # rows of what is missing are left out
    python -m benchmarks.data [--folder DIR] [--out benchmarks/results/data.json]

Without a folder of JPEGs it makes one like ImageNet: mixtures of the demo's photographs, mostly
500 x 375 pixels, of about 110 KB. Each row is a process of its own that decodes, crops (the paper's
law), resizes to 224 x 224 and flips; rows take turns in several rounds, and medians are shown.
CPU time is that of the process and all its children, so that it does not depend on how busy the
machine is. PSNR is against Pillow's crop and resize, which is what the official code trains on; a
speed without it says little, as most fast ways are not antialiased.

For mae_jax (device) only the host's part is measured; resizing is the accelerator's.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import cpu_seconds, processor, versions
from mae_jax.data.loader import Loader, ordered_parallel_map
from mae_jax.data.sources import FolderSource
from mae_jax.data.transforms import DeviceResizeTransform, TrainTransform, random_crop_box
from mae_jax.utils import console

SIZE, SCALE, BATCH, CANVAS = (224, 224), (0.2, 1.0), 64, 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batches = Iterator[int]  # numbers of images
CORES, SHARE = 16, 0.75  # of the projection: cores, and what of them threads that share a core give
PACKAGES = ("jax", "grain", "pillow", "pillow-simd", "simplejpeg", "torch", "torchvision")
PACKAGES += ("tensorflow-cpu", "tensorflow")


# The folder


def make_folder(folder: Path, count: int) -> None:
    """JPEGs of the sizes and qualities of ImageNet, about 110 KB each."""
    from mae_jax.data.demo_dataset import PHOTOGRAPHS, photograph

    photographs = [photograph(name) for name in PHOTOGRAPHS]
    shapes, shares = [(500, 375), (375, 500), (500, 333), (640, 480)], [0.56, 0.2, 0.12, 0.12]

    def make(number: int) -> int:
        rng = np.random.default_rng(number)
        width, height = shapes[rng.choice(len(shapes), p=shares)]
        mixed = np.zeros((height, width, 3))
        for index in rng.choice(len(photographs), 2, replace=False):
            image = photographs[index]
            left, top, right, lower = random_crop_box(rng, (image.height, image.width), (0.3, 1.0))
            part = image.crop((left, top, right, lower)).resize((width, height))
            mixed += np.asarray(part) / 2
        mixed += rng.normal(0, 11, mixed.shape)
        quality = int(np.clip(rng.normal(91, 4), 70, 98))
        subsampling = 2 if rng.random() < 0.7 else 0
        picture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:05d}.jpg", quality=quality, subsampling=subsampling)
        return number

    for _ in console.progress(ordered_parallel_map(make, count, os.cpu_count() or 1), count):
        pass


# The contenders: batches of a folder, and one image of a box, for its quality


def ours(transform: Any, folder: Path, workers: int, *, processes: bool = False) -> Batches:
    loader = Loader(
        source=FolderSource(str(folder), "train"),
        transform=transform,
        seed=0,
        batch_size=BATCH,
        shapes=getattr(transform, "shapes", {}),
        workers=workers if processes else 0,
        threads=1 if processes else workers,
    )
    for batch in loader.batches(0):
        yield len(batch["label"])


HOST = TrainTransform(SIZE, 3, SCALE)
DEVICE = DeviceResizeTransform(HOST, CANVAS)


def nothing(encoded: Any, rng: Any) -> dict[str, np.ndarray]:
    """A transform that leaves what a record costs besides its pixels."""
    random_crop_box(rng, (375, 500), SCALE)
    return {"image": np.zeros(1, np.uint8)}


class TorchFiles:
    """A torch data set of files, as torchvision's ImageFolder reads them."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]):
        self.files, self.transform = sorted(folder.glob("*.jpg")), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with open(self.files[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


@functools.cache
def torchvision() -> Any:
    """The package; beside the CPU build of torch without operators that transforms do not use."""
    import torch

    if not torch.version.cuda:
        library = torch.library.Library("torchvision", "DEF")
        for missing in ("nms", "qnms"):
            library.define(f"{missing}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        KEPT.append(library)
    import torchvision.transforms

    return torchvision.transforms


KEPT: list[Any] = []  # operators are there as long as their library is


def torchvision_transform(as_floats: bool) -> Callable[[Image.Image], Any]:
    """The official code's; without the last two steps it ends with uint8, as ours does."""
    transforms = torchvision()
    steps: list[Any] = [
        transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=3),
        transforms.RandomHorizontalFlip(),
    ]
    if as_floats:
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return transforms.Compose([*steps, transforms.PILToTensor()])


def torch_loader(folder: Path, workers: int, *, as_floats: bool) -> Batches:
    from torch.utils.data import DataLoader

    dataset = TorchFiles(folder, torchvision_transform(as_floats))
    while True:
        loader = DataLoader(
            dataset,
            BATCH,
            shuffle=True,
            num_workers=workers,
            drop_last=True,  # pyright: ignore
        )
        for batch in loader:
            yield len(batch)


def tf_image(encoded: Any, box: Any) -> Any:
    import tensorflow as tf

    crop = tf.image.decode_and_crop_jpeg(encoded, box, channels=3)
    image = tf.image.resize(crop, SIZE, "bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def tf_loader(folder: Path, workers: int) -> Batches:
    import tensorflow as tf

    files = [str(path) for path in sorted(folder.glob("*.jpg"))]

    def example(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros((1, 0, 4)),
            area_range=SCALE,
            aspect_ratio_range=(3 / 4, 4 / 3),
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([begin[:2], size[:2]], 0)
        return tf.image.random_flip_left_right(tf_image(encoded, box))

    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(example, num_parallel_calls=workers).batch(BATCH).with_options(options)
    for batch in dataset.prefetch(2):
        yield batch.shape[0]


NEEDS = {"torchvision": "torchvision", "tf.data": "tensorflow"}
CONTENDERS: dict[str, Callable[[Path, int], Batches]] = {
    "torchvision, official transform": lambda f, n: torch_loader(f, n, as_floats=True),
    "torchvision, up to uint8": lambda f, n: torch_loader(f, n, as_floats=False),
    "tf.data, antialiased bicubic": tf_loader,
    "mae_jax (host)": lambda f, n: ours(HOST, f, n),
    "mae_jax (host), processes": lambda f, n: ours(HOST, f, n, processes=True),
    "mae_jax (device)": lambda f, n: ours(DEVICE, f, n),
    "mae_jax, without decoding": lambda f, n: ours(nothing, f, n),
}
BASELINE = "torchvision, official transform"


def available() -> list[str]:
    def there(name: str) -> bool:
        needs = [module for start, module in NEEDS.items() if name.startswith(start)]
        return all(importlib.util.find_spec(module) for module in needs)

    return [name for name in CONTENDERS if there(name)]


# What is measured of one contender, in a process of its own


def measure(name: str, folder: Path, workers: int, images: int) -> dict[str, float]:
    """Speed over `images` images, after as many as are in flight."""
    begin = time.perf_counter()
    batches = CONTENDERS[name](folder, workers)
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(6):
        next(batches)
    wall, cpu, done = time.perf_counter(), cpu_seconds(os.getpid()), 0
    while done < images:
        done += next(batches)
    cpu, wall = cpu_seconds(os.getpid()) - cpu, time.perf_counter() - wall
    return {"first_batch_s": first, "images_per_s": done / wall, "cpu_us": 1e6 * cpu / done}


def quality(name: str, folder: Path, images: int = 100) -> dict[str, float]:
    """PSNR against Pillow's crop and resize of the same boxes."""
    found = []
    for number, path in enumerate(sorted(folder.glob("*.jpg"))[:images]):
        encoded = path.read_bytes()
        with Image.open(path) as image:
            size = image.height, image.width
            box = random_crop_box(np.random.default_rng(number), size, SCALE)
            crop = image.convert("RGB").crop(box)
        expected = np.asarray(crop.resize(SIZE[::-1], Image.Resampling.BICUBIC), float)
        error = np.square(made(name, encoded, box, number) - expected).mean()
        found.append(10 * np.log10(255**2 / max(error, 1e-3)))
    return {"psnr_mean": float(np.mean(found)), "psnr_min": float(np.min(found))}


def made(name: str, encoded: bytes, box: tuple[int, ...], seed: int) -> np.ndarray:
    """One crop without its flip, as a contender makes it."""
    left, top, right, lower = box
    if name.startswith("torchvision"):
        functional = torchvision().functional
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        height, width = lower - top, right - left
        return np.asarray(
            functional.resized_crop(image, top, left, height, width, list(SIZE), 3)  # pyright: ignore
        )
    if name.startswith("tf"):
        return np.asarray(tf_image(encoded, (top, left, lower - top, right - left)))
    rng = np.random.default_rng(seed)
    plain = TrainTransform(SIZE, 3, SCALE, flip=False)
    if "host" in name:
        return plain(encoded, rng)["image"]
    from mae_jax.models.image_ops import crop_resize

    example = DeviceResizeTransform(plain, CANVAS)(encoded, rng)
    canvas = np.zeros((1, CANVAS, CANVAS, 3), np.uint8)
    height, width = example["crop"].shape[:2]
    canvas[0, :height, :width] = example["crop"]
    flips = np.zeros(1, bool)
    return np.asarray(crop_resize(canvas, example["crop_size"][None], flips, SIZE))[0]


def in_a_process(what: str, name: str, folder: Path, *arguments: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data", what, name, str(folder)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if run.returncode:
        sys.exit(f"{name}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


# All of them


def compare(folder: Path, workers: int, rounds: int, images: int) -> list[dict[str, Any]]:
    names = available()
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    turns = [name for _ in range(rounds) for name in order.permutation(names)]
    for name in console.progress(turns, len(turns), "runs"):
        taken[name].append(in_a_process("measure", name, folder, workers, images))
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for key in taken[name][0]:
            row[key] = round(median(run[key] for run in taken[name]), 3)
        row["cpu_us_runs"] = sorted(round(run["cpu_us"]) for run in taken[name])
        if "without" not in name:
            row |= in_a_process("quality", name, folder)
        rows.append(row)
    for row in rows:
        base = next((r["cpu_us"] for r in rows if r["name"] == BASELINE), None)
        row["ratio"] = round(base / row["cpu_us"], 2) if base else None
    return rows


def sweep(folder: Path, most: int, rounds: int, images: int) -> list[dict[str, Any]]:
    """Images per second by the number of threads (of ours) or processes (of torch).

    With one of them the CPU time is also that of a core which shares nothing, from which 16 cores
    are projected.
    """
    names = [n for n in available() if n in (BASELINE, "mae_jax (host)", "mae_jax (device)")]
    counts = [n for n in (1, 2, 4, 8, 16) if n <= most]
    turns = [(name, count) for _ in range(rounds) for count in counts for name in names]
    taken: dict[tuple[str, int], list[dict[str, float]]] = {turn: [] for turn in turns}
    for turn in console.progress(turns, len(turns), "runs"):
        taken[turn].append(in_a_process("measure", turn[0], folder, turn[1], images))
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for count in counts:
            row[str(count)] = round(median(run["images_per_s"] for run in taken[name, count]), 1)
        row["cpu_us_of_one"] = round(median(run["cpu_us"] for run in taken[name, 1]))
        row["projected_16_cores"] = round(1e6 / row["cpu_us_of_one"] * CORES * SHARE)
        rows.append(row)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        name, folder, workers, images = sys.argv[2:]
        print(json.dumps(measure(name, Path(folder), int(workers), int(images))))
        os._exit(0)  # without waiting for threads that read ahead
    if sys.argv[1:2] == ["quality"]:
        print(json.dumps(quality(sys.argv[2], Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, help="of JPEGs; made unless given")
    parser.add_argument("--files", type=int, default=1000, help="to make (1000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024, help="in each round (1024)")
    parser.add_argument("--out", type=Path, help="the results as .json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made_folder:
        folder = arguments.folder or Path(made_folder)
        if not arguments.folder:
            make_folder(folder, arguments.files)
        sizes = [len(path.read_bytes()) for path in folder.glob("*.jpg")]  # they are in memory now
        rows = compare(folder, arguments.workers, arguments.rounds, arguments.images)
        speeds = sweep(folder, arguments.workers, arguments.rounds, arguments.images)
    report = {
        "command": "python -m benchmarks.data",
        "files": len(sizes),
        "mean_kb": round(sum(sizes) / len(sizes) / 1e3, 1),
        "workers": arguments.workers,
        "rounds": arguments.rounds,
        "machine": f"{os.cpu_count()} x {processor()}",
        "versions": versions(PACKAGES),
        "rows": rows,
        "images_per_s_by_workers": speeds,
    }
    show(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def show(report: dict[str, Any]) -> None:
    rows = []
    for row in report["rows"]:
        psnr = f"{row['psnr_mean']:.1f} / {row['psnr_min']:.1f}" if "psnr_mean" in row else ""
        rows.append(
            (
                row["name"],
                psnr,
                f"{row['cpu_us']:.0f}",
                row["ratio"],
                f"{row['images_per_s']:.0f}",
                f"{row['first_batch_s']:.1f}",
            )
        )
    columns = ("", "PSNR mean / least", "CPU us", "ratio", "images/s", "first s")
    title = f"{report['files']} files of {report['mean_kb']} KB, {report['workers']} workers"
    console.print_table(f"{title}, {report['machine']}", columns, rows)
    print(f"CPU us: per image. ratio: of CPU time, to {BASELINE}.\n")
    speeds = report["images_per_s_by_workers"]
    columns = [key for key in speeds[0] if key != "name"]
    lines = [[row["name"], *(row[column] for column in columns)] for row in speeds]
    console.print_table("images/s by workers", ("", *columns), lines)
    print(f"16 cores: a projection, {CORES} x {SHARE} of one core's in the CPU time of 1 worker.")


if __name__ == "__main__":
    main()
