"""Open the datasets of a run."""

from pathlib import Path

from mae_jax.data.bit_depth import warn_of_loss
from mae_jax.data.factory import DatasetSpec, has_split
from mae_jax.data.in_memory import InMemory
from mae_jax.data.sampling import read_scores, sample
from mae_jax.data.segmentation import SegmentationSource, open_folder_masks, open_tfds_masks
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import few_shot
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
            "images needs one subfolder per class, a TFDS dataset a ClassLabel called 'label', tar "
            "files a .cls member per image, Parquet files integers in the column 'label'"
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
                "the images to evaluate on, next to those of data.train_split; in a pattern of "
                "files, {split} stands for both"
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
