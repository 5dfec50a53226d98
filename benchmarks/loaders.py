"""Loaders of JPEGs beside torchvision and tf.data; a part of `benchmarks.input_pipeline`."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from benchmarks.interleaved import Stopwatch, round_orders
from mae_jax.data.loader import Loader
from mae_jax.data.sources import FolderSource
from mae_jax.data.transforms import DeviceResizeTransform, TrainTransform
from mae_jax.utils.console import progress
from mae_jax.utils.errors import UserError

SIZE, SCALE, BATCH, CANVAS = (224, 224), (0.2, 1.0), 64, 512


# Loaders yield the number of images of their batches

HOST = TrainTransform(SIZE, 3, SCALE)
DEVICE = DeviceResizeTransform(HOST, CANVAS)


def list_files(folder: Path) -> list[Path]:
    source = FolderSource(str(folder), "train")
    return [source.root / name for name in source.files]


def mae_jax_loader(
    folder: Path, threads: int, transform: Any = HOST, *, processes: bool = False
) -> Iterator[int]:
    loader = Loader(
        source=FolderSource(str(folder), "train"),
        transform=transform,
        seed=0,
        batch_size=BATCH,
        shapes=getattr(transform, "shapes", {}),
        workers=threads if processes else 0,
        threads=1 if processes else threads,
    )
    for batch in loader.batches(0):
        yield len(batch["label"])


class TorchDataset:
    """Reads files like torchvision's ImageFolder."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]):
        self.files, self.transform = list_files(folder), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with open(self.files[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


def torch_loader(folder: Path, threads: int) -> Iterator[int]:
    """Yield batches of the official code's transform."""
    from torch.utils.data import DataLoader

    from benchmarks.torch_models import import_with_torchvision

    transforms = import_with_torchvision("torchvision.transforms")
    steps = [
        transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=3),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    dataset: Any = TorchDataset(folder, transforms.Compose(steps))
    while True:
        loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=threads, drop_last=True)
        for batch in loader:
            yield len(batch)


def tf_loader(folder: Path, threads: int) -> Iterator[int]:
    import tensorflow as tf

    files = [str(path) for path in list_files(folder)]

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
        crop = tf.image.decode_and_crop_jpeg(encoded, box, channels=3)
        image = tf.image.resize(crop, SIZE, "bicubic", antialias=True)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return tf.image.random_flip_left_right(image)

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(example, num_parallel_calls=threads).batch(BATCH).with_options(options)
    for batch in dataset.prefetch(2):
        yield batch.shape[0]


BASELINE = "torchvision, official transform"
LOADERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    BASELINE: torch_loader,
    "tf.data, antialiased bicubic": tf_loader,
    "mae_jax (host)": mae_jax_loader,
    "mae_jax (host), processes": functools.partial(mae_jax_loader, processes=True),
    "mae_jax (device)": functools.partial(mae_jax_loader, transform=DEVICE),
}


def installed_loaders() -> list[str]:
    needs = {"torchvision": "torchvision", "tf.data": "tensorflow"}
    missing = [name for name, module in needs.items() if not importlib.util.find_spec(module)]
    return [name for name in LOADERS if not name.startswith(tuple(missing))]


def throughput(name: str, folder: Path, threads: int, images: int) -> dict[str, float]:
    """Return throughput and CPU time over `images` images, after those in flight."""
    batches = LOADERS[name](folder, threads)
    for _ in range(7):
        next(batches)
    stopwatch, done = Stopwatch(), 0
    while done < images:
        done += next(batches)
    took = stopwatch.read()
    return {"images_per_s": done / took["wall"], "cpu_us": 1e6 * took["cpu"] / done}


def in_subprocess(*request: Any) -> dict[str, float]:
    """Call `throughput` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loaders", json.dumps(request, default=str)]
    variables = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if run.returncode:
        raise UserError(f"{request[0]}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compare_loaders(folder: Path, threads: int, rounds: int, images: int) -> list[dict[str, Any]]:
    """Return medians over the rounds, and the ratio of the baseline's CPU time, per loader."""
    names = installed_loaders()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    order = [name for names in round_orders(names, rounds) for name in names]
    for name in progress(order, len(order), "runs"):
        runs[name].append(in_subprocess(name, folder, threads, images))
    rows: list[dict[str, Any]] = []
    for name in names:
        medians = {key: round(median(run[key] for run in runs[name]), 1) for key in runs[name][0]}
        rows.append({"name": name, **medians})
    baseline = next((row["cpu_us"] for row in rows if row["name"] == BASELINE), None)
    for row in rows:
        row["ratio"] = round(baseline / row["cpu_us"], 2) if baseline else None
    return rows


if __name__ == "__main__":
    name, folder, *arguments = json.loads(sys.argv[1])
    print(json.dumps(throughput(name, Path(folder), *arguments)), flush=True)
    os._exit(0)  # without waiting for threads that prefetch
