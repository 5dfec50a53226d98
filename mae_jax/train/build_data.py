"""Where the images of a run come from, and how they are read, cropped and resized."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from mae_jax.data.batches import Batch
from mae_jax.data.decode import MODES, decode
from mae_jax.data.factory import has_split, open_source
from mae_jax.data.in_memory import InMemory
from mae_jax.data.loader import Loader, available_cpus, eval_batches
from mae_jax.data.randaugment import RandAugment
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import few_shot
from mae_jax.data.transforms import (
    AUGMENTS,
    DeviceResizeTransform,
    EvalTransform,
    TrainTransform,
    default_crop_ratio,
)
from mae_jax.distributed import sharding
from mae_jax.distributed.inference import EvalBatches
from mae_jax.models.image_ops import crop_resize, stats_match_dtype
from mae_jax.train import Config
from mae_jax.utils import console

RESIZERS = ("auto", "host", "device")


def check_seeds(config: Config) -> None:
    """ValueError for seeds, and numbers of shots, that cannot be."""
    for key, seed in (("seed", config.seed), ("data.shots_seed", config.data.shots_seed)):
        if not 0 <= seed < 2**32:
            raise ValueError(f"{key}={seed} must be a number from 0 to {2**32 - 1}")
    if config.data.shots is not None and config.data.shots < 1:
        raise ValueError(f"data.shots={config.data.shots} must be at least 1")


def make_train_source(config: Config, index_dir: Path) -> Source:
    """The images to train on; `index_dir` as in TfdsSource."""
    data = config.data
    if data.source == "folder" and data.path:
        train, other = (Path(data.path) / split for split in (data.train_split, data.eval_split))
        if other.is_dir() and not train.is_dir():
            raise DataError(f"{other} exists, but no {train}: data.train_split names it")
    source = _open(config, data.train_split, (), index_dir)
    needed = config.task == "classify" or data.shots is not None
    if needed and not source.classes:
        where = f"{data.name}/{data.train_split}" if data.source == "tfds" else data.path
        raise DataError(
            f"{where} has no class labels, which task='classify' and data.shots need: a folder of "
            "images needs one folder per class, a TFDS data set a ClassLabel called 'label'"
        )
    source = source if data.shots is None else few_shot(source, data.shots, data.shots_seed)
    return _in_memory(config, source)


def make_eval_source(
    config: Config, classes: tuple[str, ...], index_dir: Path | None
) -> Source | None:
    """The evaluation split; None for files without one, unless classes are to be judged."""
    data = config.data
    if data.source != "tfds" and not has_split(Path(data.path), data.eval_split, (data.source,)):
        if config.task == "classify":
            raise DataError(
                f"{Path(data.path) / data.eval_split} does not exist: data.eval_split names the "
                "images to evaluate on, beside those of data.train_split"
            )
        return None
    source = _open(config, data.eval_split, classes, index_dir)
    if config.task == "classify" and not source.classes:
        raise DataError(
            f"the images of data.eval_split={data.eval_split!r} have no class labels: they need "
            "one folder per class"
        )
    return _in_memory(config, source)


def _open(config: Config, split: str, classes: tuple[str, ...], index_dir: Path | None) -> Source:
    data = config.data
    return open_source(
        data.source,
        data.name,
        data.path,
        split,
        classes,
        image=data.image_feature,
        index_dir=index_dir,
    )


def _in_memory(config: Config, source: Source) -> Source:
    if not config.data.in_memory:
        return source
    channels, exif = config.model.channels, config.data.exif
    return InMemory(source, channels, exif=exif, threads=available_cpus())


def pixel_dtype(config: Config, source: Source) -> np.dtype:
    """The type of a source's values, by its first image; uint8 where that is bad.

    Raises:
      ValueError: data.mean and data.std are not in the units of such values.
    """
    try:
        kind = decode(source[0]["image"], config.model.channels).dtype
    except DataError:
        return np.dtype(np.uint8)  # reading it will say so, or skip it
    if not stats_match_dtype(kind, tuple(config.data.mean)):
        raise ValueError(
            f"{source.key(0)} has values of {kind}, which data.mean={tuple(config.data.mean)} does "
            "not fit: of uint8 it is a share of 255, of other types in the units of the values. "
            "python -m mae_jax.data stats computes it"
        )
    return kind


def make_eval_transform(config: Config) -> EvalTransform:
    size, data = tuple(config.model.image_size), config.data
    crop = default_crop_ratio(size) if data.eval_crop is None else data.eval_crop
    return EvalTransform(size, config.model.channels, crop=crop, exif=data.exif)


def make_train_transform(config: Config, kind: np.dtype) -> EvalTransform | TrainTransform:
    """What is done to the images of training, of values of a type, if the host resizes them."""
    data = config.data
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_scale={tuple(data.crop_scale)} must rise within 0 to 1")
    if data.augment not in AUGMENTS:
        raise ValueError(f"data.augment={data.augment!r}; use one of {', '.join(AUGMENTS)}")
    if data.augment == "none":
        return make_eval_transform(config)
    augment = None
    if data.augment == "randaugment":
        if config.model.channels not in MODES or kind != np.uint8:
            raise ValueError("data.augment='randaugment' is for grey and RGB images of uint8")
        augment = RandAugment(
            fill=tuple(round(255 * mean) for mean in data.mean),
            magnitude=data.randaugment_magnitude,
            std=data.randaugment_std,
            layers=data.randaugment_layers,
        )
    return TrainTransform(
        tuple(config.model.image_size),
        config.model.channels,
        tuple(data.crop_scale),
        flip=data.flip,
        weak=data.augment == "weak_crop",
        augment=augment,
        exif=data.exif,
    )


def resizes_on_device(config: Config, kind: np.dtype) -> bool:
    """Whether crops of training images, of values of a type, are resized by the devices.

    Raises:
      ValueError: that is asked for, but cannot be.
    """
    data, model = config.data, config.model
    if data.resize_on not in RESIZERS:
        raise ValueError(f"data.resize_on={data.resize_on!r}; use one of {', '.join(RESIZERS)}")
    if data.canvas < 1:
        raise ValueError(f"data.canvas={data.canvas} must be at least 1, pixels")
    possible = data.augment in ("crop", "weak_crop") and model.channels in MODES
    possible = possible and kind == np.uint8 and data.canvas >= max(model.image_size)
    if data.resize_on == "device" and not possible:
        raise ValueError(
            "data.resize_on='device' is for data.augment='crop' or 'weak_crop', for grey or RGB "
            f"images of uint8, and for a data.canvas (={data.canvas}) not smaller than "
            "model.image_size"
        )
    if data.resize_on == "auto":
        return possible and jax.default_backend() != "cpu"
    return data.resize_on == "device"


def worker_counts(config: Config) -> tuple[int, int]:
    """Processes that read images, and threads of each."""
    data = config.data
    if data.workers < 0:
        raise ValueError(f"data.workers={data.workers} must be at least 0")
    if data.threads is not None and data.threads < 1:
        raise ValueError(f"data.threads={data.threads} must be at least 1")
    if data.workers and (data.in_memory or data.source == "arrays"):
        raise ValueError(
            f"data.workers={data.workers}: images in memory are read by threads of the main "
            "process, which data.workers=0 asks for; each other would hold all of them"
        )
    return data.workers, data.threads or max(available_cpus() // max(data.workers, 1), 1)


def make_device_preprocess(
    config: Config, mesh: jax.sharding.Mesh, on_device: bool
) -> Callable[[dict], dict]:
    """What the devices do to a batch before the task takes it."""
    if not on_device:
        return lambda batch: batch
    size = tuple(config.model.image_size)
    # Each device resizes the images that it has.
    resize = jax.shard_map(
        partial(crop_resize, image_size=size),
        mesh=mesh,
        in_specs=sharding.BATCH_SPEC,
        out_specs=sharding.BATCH_SPEC,
    )

    def prepare(batch: dict) -> dict:
        crops = [batch[name] for name in ("crop", "crop_size", "flip")]
        return {"image": resize(*crops), "label": batch["label"]}

    return prepare


def input_bound_hint(config: Config, on_device: bool) -> str:
    """What to do where reading images is what training waits for."""
    workers, threads = worker_counts(config)
    found = [f"more cores, with data.threads above {threads}"]
    if workers:
        found = [f"more cores, with data.workers above {workers} of {threads} threads each"]
    if jax.default_backend() != "cpu" and not on_device:
        found.append("data.resize_on=device")
    if not config.data.in_memory:
        found.append("data.in_memory=True for small images")
        found.append("smaller files, by python -m mae_jax.data cache (which changes the data)")
    return "; ".join(found)


def make_loader(config: Config, source: Source, num_classes: int | None, kind: np.dtype) -> Loader:
    data = config.data
    if data.on_bad not in ("raise", "skip"):
        raise ValueError(f"data.on_bad={data.on_bad!r}; use 'raise' or 'skip'")
    transform, shapes = make_train_transform(config, kind), {}
    if resizes_on_device(config, kind):
        assert isinstance(transform, TrainTransform)
        transform = DeviceResizeTransform(transform, data.canvas)
        shapes = transform.shapes
    workers, threads = worker_counts(config)
    return Loader(
        source=source,
        transform=transform,
        seed=config.seed,
        batch_size=config.batch_size,
        shapes=shapes,
        workers=workers,
        threads=threads,
        skip=data.on_bad == "skip",
        max_bad=data.max_bad,
        num_classes=num_classes,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def _shown_images(batch: Batch) -> int:
    """Of all processes, by those of the one that shows them."""
    return console.num_valid(batch) * jax.process_count()


def make_eval_batches(
    config: Config,
    source: Source,
    mesh: jax.sharding.Mesh,
    *,
    num_classes: int | None = None,
    show: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> EvalBatches:
    """The images of a source in order, as evaluation sees them.

    With `show` reading them has a progress bar, which must not be inside another. `note` is told
    of every batch.
    """

    def noted(batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            note(f"evaluating, on batch {number} of images")
            yield batch

    def read() -> Iterator[Batch]:
        batches = eval_batches(
            source,
            make_eval_transform(config),
            sharding.round_up_batch(config.eval.batch_size, mesh),
            threads=available_cpus(),
            skip=config.data.on_bad == "skip",
            max_bad=config.data.max_bad,
            num_classes=num_classes,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        if show:
            batches = console.progress(batches, len(source), count=_shown_images)
        return noted(batches)

    return EvalBatches(len(source), read)
