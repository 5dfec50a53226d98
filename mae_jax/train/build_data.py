"""Build the input pipeline and the evaluation batches of a run."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from mae_jax.data.collate import Batch
from mae_jax.data.decode import MODES, decode, decode_masked
from mae_jax.data.in_memory import InMemory
from mae_jax.data.loader import Loader, Transform, eval_batches
from mae_jax.data.mask_transforms import ScaleCropTransform, WholeTransform
from mae_jax.data.randaugment import RandAugment
from mae_jax.data.sources import DataError, Source
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
