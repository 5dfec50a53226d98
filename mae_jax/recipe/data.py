"""Where the images of a run come from, and what is done to them on the host."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mae_jax import console
from mae_jax.data.augment import RandAugment
from mae_jax.data.loader import Batch, Loader, ordered_batches
from mae_jax.data.sources import DataError, Source, make_source
from mae_jax.data.subsets import few_shot
from mae_jax.data.transforms import AUGMENTS, EvalTransform, TrainTransform

Config = Any  # an ml_collections.ConfigDict, whose keys no type checker knows


def make_train_source(config: Config) -> Source:
    data = config.data
    source = make_source(data.source, data.name, data.path, data.train_split)
    needed = config.task == "classify" or data.shots is not None
    if needed and not source.classes:
        where = data.path if data.source == "folder" else f"{data.name}/{data.train_split}"
        raise DataError(
            f"{where} has no class labels, which task='classify' and data.shots need: a folder of "
            "images needs one folder per class, a TFDS data set a ClassLabel called 'label'"
        )
    return source if data.shots is None else few_shot(source, data.shots, data.shots_seed)


def make_eval_source(config: Config, classes: tuple[str, ...]) -> Source | None:
    """The evaluation split; None for a folder without one, unless classes are to be judged."""
    data = config.data
    if data.source == "folder" and not (Path(data.path) / data.eval_split).is_dir():
        if config.task == "classify":
            raise DataError(
                f"{Path(data.path) / data.eval_split} does not exist: data.eval_split names the "
                "folder of images to evaluate on, beside that of data.train_split"
            )
        return None
    return make_source(data.source, data.name, data.path, data.eval_split, classes)


def make_eval_transform(config: Config) -> EvalTransform:
    return EvalTransform(
        tuple(config.model.image_size), config.model.channels, config.data.eval_crop
    )


def make_train_transform(config: Config) -> EvalTransform | TrainTransform:
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
        data.flip,
        data.augment,
        augment,
    )


def make_loader(config: Config, source: Source, num_classes: int | None) -> Loader:
    data = config.data
    if data.on_bad not in ("raise", "skip"):
        raise ValueError(f"data.on_bad={data.on_bad!r}; use 'raise' or 'skip'")
    return Loader(
        source=source,
        transform=make_train_transform(config),
        seed=config.seed,
        batch_size=config.batch_size,
        workers=data.workers,
        threads=data.threads,
        skip=data.on_bad == "skip",
        max_bad=data.max_bad,
        num_classes=num_classes,
    )


Ordered = tuple[int, Callable[[], Iterable[Batch]]]


def make_ordered(
    config: Config,
    source: Source,
    mesh: jax.sharding.Mesh,
    num_classes: int | None = None,
    show: bool = False,
) -> Ordered:
    """How many images, and a function that reads them in order, as evaluation sees them.

    With `show` there is a progress bar, which must not be inside another.
    """
    # The last batch is filled up, so every batch splits over the devices.
    batch_size = int(np.ceil(config.eval.batch_size / mesh.size)) * mesh.size
    read = partial(
        ordered_batches,
        source,
        make_eval_transform(config),
        batch_size,
        threads=config.data.threads,
        skip=config.data.on_bad == "skip",
        num_classes=num_classes,
    )
    if not show:
        return len(source), read
    return len(source), lambda: console.progress(
        read(), len(source), lambda b: int(b["valid"].sum())
    )
