"""Build the datasets, the input pipeline and the evaluation batches of a run."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mae_jax.data.bit_depth import warn_of_loss
from mae_jax.data.collate import Batch
from mae_jax.data.decode import MODES, decode, decode_masked
from mae_jax.data.factory import DatasetSpec, has_split
from mae_jax.data.in_memory import InMemory
from mae_jax.data.loader import Loader, Transform, eval_batches
from mae_jax.data.mask_transforms import ScaleCropTransform, WholeTransform
from mae_jax.data.randaugment import RandAugment
from mae_jax.data.sampling import read_scores, sample
from mae_jax.data.segmentation import SegmentationSource, open_folder_masks, open_tfds_masks
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import few_shot
from mae_jax.data.transforms import (
    DeviceResizeTransform,
    EvalTransform,
    TrainTransform,
    default_crop_ratio,
)
from mae_jax.distributed import sharding
from mae_jax.distributed.inference import EvalBatches
from mae_jax.models.image_ops import crop_resize, stats_match_dtype
from mae_jax.train.config import Config
from mae_jax.utils.cpus import available_cpus


def make_train_source(config: Config, index_dir: Path) -> Source:
    """Open the training split.

    Args:
      index_dir: where indices of TFRecord files are cached.

    Raises:
      DataError: it cannot be read, or lacks the class labels that the task needs.
    """
    data = config.data
    if data.source == "folder" and data.path:
        train, other = (Path(data.path) / split for split in (data.train_split, data.eval_split))
        if other.is_dir() and not train.is_dir():
            raise DataError(f"{other} exists, but no {train}: data.train_split names it")
    source = _open(config, data.train_split, (), index_dir)
    needs_labels = config.task == "classify" or data.shots is not None
    if needs_labels and not source.classes:
        where = f"{data.name}/{data.train_split}" if data.source == "tfds" else data.path
        raise DataError(
            f"{where} has no class labels, which task='classify' and data.shots need: a folder of "
            "images needs one subfolder per class, a TFDS dataset a ClassLabel called 'label'"
        )
    source = _sample(config, source)
    source = source if data.shots is None else few_shot(source, data.shots, data.shots_seed)
    if data.bit_depth is None and data.bands is None:
        warn_of_loss(source, config.model.channels)
    return _in_memory(config, source)


def _sample(config: Config, source: Source) -> Source:
    """Return the images that data.sampling keeps."""
    sampling = config.data.sampling
    if sampling.scores is None:
        return source
    return sample(
        source,
        read_scores(Path(sampling.scores)),
        seed=config.seed,
        loss=sampling.loss,
        min_entropy=sampling.min_entropy,
        min_side=sampling.min_side,
    )


def make_eval_source(
    config: Config, classes: tuple[str, ...], index_dir: Path | None
) -> Source | None:
    """Open the evaluation split.

    Returns:
      None for files without that split, which only tasks with labels require.

    Raises:
      DataError: it cannot be read, or lacks the class labels that the task needs.
    """
    data = config.data
    path = data.path or ""
    if data.source not in ("tfds", "hf") and not has_split(path, data.eval_split, data.source):
        if config.task != "pretrain":
            raise DataError(
                f"{Path(path) / data.eval_split} does not exist: data.eval_split names "
                "the images to evaluate on, next to those of data.train_split"
            )
        return None
    source = _open(config, data.eval_split, classes, index_dir)
    if config.task == "classify" and not source.classes:
        raise DataError(
            "has no class labels: it needs one subfolder per class",
            key="data.eval_split",
            value=data.eval_split,
        )
    return _in_memory(config, source)


def _open(config: Config, split: str, classes: tuple[str, ...], index_dir: Path | None) -> Source:
    if config.task == "segment":
        return open_masks(config, split, index_dir)
    if config.eval.segment_knn:
        return open_masks(config, split, index_dir).images
    return _dataset(config, index_dir).open(split, classes)


def _dataset(config: Config, index_dir: Path | None) -> DatasetSpec:
    data = config.data
    return DatasetSpec(data.source, data.name, data.path, data.image_feature, index_dir)


def open_masks(config: Config, split: str, index_dir: Path | None) -> SegmentationSource:
    """Open a split of images with masks.

    Raises:
      DataError: it does not exist, or has no masks.
    """
    data, segment = config.data, config.segment
    if data.source == "tfds":
        dataset = _dataset(config, index_dir)
        return open_tfds_masks(dataset, split, segment.mask_feature, segment.ignore)
    if not data.path:
        raise data.error("source", "needs data.path, a folder")
    return open_folder_masks(Path(data.path), split, segment.ignore)


def class_names(config: Config, source: Source) -> tuple[str, ...]:
    """Return the names of the classes of images or pixels, as far as they are known."""
    return getattr(source, "class_names", ()) if config.task == "segment" else source.classes


def _in_memory(config: Config, source: Source) -> Source:
    if not config.data.in_memory:
        return source
    return InMemory(
        source,
        config.model.channels,
        exif=config.data.exif,
        bit_depth=config.data.bit_depth,
        options=config.data.read_options,
        threads=available_cpus(),
    )


def pixel_dtype(config: Config, source: Source) -> np.dtype:
    """Return the dtype of a source's first image; the usual one if that image is bad.

    Raises:
      UserError: data.mean and data.std are not in the units of that dtype.
    """
    bit_depth, options = config.data.bit_depth, config.data.read_options
    becomes_float = bit_depth is not None or options.nodata is not None
    original = source.original if isinstance(source, InMemory) else source
    arguments: dict[str, Any] = {"bit_depth": bit_depth, "options": options}
    try:
        encoded = original[0]["image"]
        dtype = decode(encoded, config.model.channels, **arguments).dtype
        units = dtype
        if options.nodata is not None:
            units = decode_masked(encoded, config.model.channels, **arguments).pixels.dtype
    except DataError:
        # Reading it raises, or skips it.
        return np.dtype(np.float32 if becomes_float else np.uint8)
    has_fractions = units == np.uint8 or bit_depth is not None
    if not stats_match_dtype(np.uint8 if has_fractions else units, config.data.mean):
        raise config.data.error(
            "mean",
            f"does not fit {source.describe(0)}, whose dtype is {units}: for uint8, mean and std "
            "are fractions of 255, and with data.bit_depth of its range; for other types they are "
            "in the units of the values. "
            "mae-jax data stats computes them",
        )
    return dtype


def make_eval_transform(
    config: Config, num_classes: int | None = None
) -> EvalTransform | WholeTransform:
    """Return the deterministic resize and center crop of evaluation; of masks only the resize.

    Args:
      num_classes: masks must be below it, if given.
    """
    size, data = config.model.image_size, config.data
    if config.task == "segment":
        return WholeTransform(**_mask_arguments(config, num_classes))
    crop = default_crop_ratio(size) if data.eval_crop is None else data.eval_crop
    return EvalTransform(
        size, config.model.channels, crop=crop, exif=data.exif, **_read_arguments(config)
    )


def _read_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of `decode` for the images of a source, which may be in memory."""
    data = config.data
    options = data.read_options.of_decoded if data.in_memory else data.read_options
    return {"bit_depth": data.bit_depth, "options": options}


def _mask_arguments(config: Config, num_classes: int | None) -> dict[str, Any]:
    return {
        "image_size": config.model.image_size,
        "channels": config.model.channels,
        "num_classes": num_classes,
        "ignore": config.segment.ignore,
        **_read_arguments(config),
    }


def make_train_transform(
    config: Config, dtype: np.dtype, num_classes: int | None = None
) -> Transform:
    """Return the augmentation of training images of a dtype, resized on the host.

    Args:
      num_classes: masks must be below it, if given.
    """
    data = config.data
    if data.augment == "none":
        return make_eval_transform(config, num_classes)
    if config.task == "segment":
        has_fractions = dtype == np.uint8 and data.bit_depth is None
        mean, _ = config.pixel_stats
        return ScaleCropTransform(
            scale=config.segment.scale,
            fill=tuple(round(255 * x) for x in mean) if has_fractions else mean,
            flip=data.flip,
            **_mask_arguments(config, num_classes),
        )
    augment = None
    if data.augment == "randaugment":
        if config.model.channels not in MODES or dtype != np.uint8:
            raise data.error("augment", "needs gray or RGB images of uint8")
        augment = RandAugment(
            fill=tuple(round(255 * mean) for mean in data.mean),
            magnitude=data.randaugment_magnitude,
            std=data.randaugment_std,
            layers=data.randaugment_layers,
        )
    return TrainTransform(
        config.model.image_size,
        config.model.channels,
        data.crop_scale,
        flip=data.flip,
        weak=data.augment == "weak_crop",
        augment=augment,
        exif=data.exif,
        **_read_arguments(config),
    )


def resizes_on_device(config: Config, dtype: np.dtype) -> bool:
    """Return whether crops of training images of a dtype are resized on the devices.

    Raises:
      UserError: data.resize_on='device' is impossible for these images.
    """
    data, model = config.data, config.model
    possible = (
        data.augment in ("crop", "weak_crop")
        and config.task != "segment"
        and model.channels in MODES
        and dtype == np.uint8
        and data.canvas >= max(model.image_size)
    )
    if data.resize_on == "device" and not possible:
        raise data.error(
            "resize_on",
            "needs data.augment='crop' or 'weak_crop', gray or RGB images of uint8 (not float32, "
            "as with data.bit_depth and data.nodata), no masks, and "
            f"a data.canvas (={data.canvas}) not smaller than model.image_size",
        )
    if data.resize_on == "auto":
        return possible and jax.default_backend() != "cpu"
    return data.resize_on == "device"


def worker_counts(config: Config) -> tuple[int, int]:
    """Return the number of processes that read images, and of threads in each."""
    workers, threads = config.data.workers, config.data.threads
    return workers, threads or max(available_cpus() // max(workers, 1), 1)


def make_device_preprocess(
    config: Config, mesh: jax.sharding.Mesh, on_device: bool
) -> Callable[[dict], dict]:
    """Return what the devices do to a batch before the objective: resize crops, or nothing."""
    if not on_device:
        return lambda batch: batch
    # Each device resizes its own images.
    resize = jax.shard_map(
        partial(crop_resize, image_size=config.model.image_size),
        mesh=mesh,
        in_specs=sharding.BATCH_SPEC,
        out_specs=sharding.BATCH_SPEC,
    )

    def preprocess(batch: dict) -> dict:
        crops = [batch[name] for name in ("crop", "crop_size", "flip")]
        return {"image": resize(*crops), "label": batch["label"]}

    return preprocess


def input_bound_hint(config: Config, on_device: bool) -> str:
    """Return what to do when training waits for images."""
    workers, threads = worker_counts(config)
    hints = [f"more cores, with data.threads above {threads}"]
    if workers:
        hints = [f"more cores, with data.workers above {workers} of {threads} threads each"]
    if jax.default_backend() != "cpu" and not on_device:
        hints.append("data.resize_on=device")
    if not config.data.in_memory:
        hints.append("data.in_memory=True for small images")
        hints.append("smaller files, by mae-jax data cache (which changes the data)")
    return "; ".join(hints)


def make_loader(config: Config, source: Source, num_classes: int | None, dtype: np.dtype) -> Loader:
    """Return the loader of augmented training batches of this process.

    Args:
      num_classes: labels, of images or pixels, must be below it; None has no labels.
      dtype: of the images.
    """
    data = config.data
    transform, shapes = make_train_transform(config, dtype, num_classes), {}
    if resizes_on_device(config, dtype):
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
        num_classes=None if config.task == "segment" else num_classes,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def make_eval_batches(
    config: Config,
    source: Source,
    mesh: jax.sharding.Mesh,
    *,
    num_classes: int | None = None,
    heartbeat: Callable[[str], None] = lambda _: None,
) -> EvalBatches:
    """Return the images of a source in order, as evaluation sees them, with masks if it has them.

    Args:
      num_classes: labels, of images or pixels, must be below it, if given.
      heartbeat: called for every batch with what is being done.
    """

    def with_heartbeat(batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            heartbeat(f"evaluating batch {number}")
            yield batch

    def read() -> Iterator[Batch]:
        batches = eval_batches(
            source,
            make_eval_transform(config, num_classes),
            sharding.round_up_batch(config.eval.batch_size, mesh),
            threads=available_cpus(),
            skip=config.data.on_bad == "skip",
            max_bad=config.data.max_bad,
            num_classes=None if config.task == "segment" else num_classes,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        return with_heartbeat(batches)

    return EvalBatches(len(source), read)
