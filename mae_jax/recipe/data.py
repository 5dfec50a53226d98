"""Where the images of a run come from, and what is done to them on the host."""

from collections.abc import Iterator
from pathlib import Path

import jax

from mae_jax import console, sharding
from mae_jax.data.augment import RandAugment
from mae_jax.data.loader import Batch, Loader, ordered_batches
from mae_jax.data.sources import DataError, Source, make_source
from mae_jax.data.subsets import few_shot
from mae_jax.data.transforms import AUGMENTS, EvalTransform, TrainTransform
from mae_jax.evals.extract import Images
from mae_jax.recipe import Config


def check_seeds(config: Config) -> None:
    """ValueError for seeds, and numbers of shots, that cannot be."""
    for key, seed in (("seed", config.seed), ("data.shots_seed", config.data.shots_seed)):
        if not 0 <= seed < 2**32:
            raise ValueError(f"{key}={seed} must be a number from 0 to {2**32 - 1}")
    if config.data.shots is not None and config.data.shots < 1:
        raise ValueError(f"data.shots={config.data.shots} must be at least 1")


def make_train_source(config: Config) -> Source:
    data = config.data
    if data.source == "folder" and data.path:
        train, other = (Path(data.path) / split for split in (data.train_split, data.eval_split))
        if other.is_dir() and not train.is_dir():
            raise DataError(f"{other} exists, but no {train}: data.train_split names it")
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
    source = make_source(data.source, data.name, data.path, data.eval_split, classes)
    if config.task == "classify" and not source.classes:
        raise DataError(
            f"the images of data.eval_split={data.eval_split!r} have no class labels: they need "
            "one folder per class"
        )
    return source


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
        flip=data.flip,
        weak=data.augment == "weak_crop",
        augment=augment,
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


def make_images(
    config: Config,
    source: Source,
    mesh: jax.sharding.Mesh,
    *,
    num_classes: int | None = None,
    show: bool = False,
) -> Images:
    """The images of a source in order, as evaluation sees them.

    With `show` reading them has a progress bar, which must not be inside another.
    """

    def read() -> Iterator[Batch]:
        batches = ordered_batches(
            source,
            make_eval_transform(config),
            sharding.round_up(config.eval.batch_size, mesh),
            threads=max(config.data.workers, 1) * config.data.threads,
            skip=config.data.on_bad == "skip",
            max_bad=config.data.max_bad,
            num_classes=num_classes,
        )
        return console.progress(batches, len(source)) if show else batches

    return Images(len(source), read)
