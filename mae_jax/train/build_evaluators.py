"""Build the evaluators of a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.data.loader import eval_batches
from mae_jax.data.mask_checks import count_classes, require_masks
from mae_jax.data.sources import Source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.distributed import sharding
from mae_jax.evaluate.figures import ReconstructionFigure, check_display_channels
from mae_jax.evaluate.rankme import MAX_IMAGES
from mae_jax.evaluate.segmentation_views import Views
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.segment import Segment
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.train.build_data import make_eval_batches, make_eval_transform
from mae_jax.train.build_model import RunLength
from mae_jax.train.build_sources import class_names, open_masks
from mae_jax.train.config import Config
from mae_jax.train.evaluators import (
    AccuracyEvaluator,
    Evaluator,
    FeatureEvaluator,
    ReconstructionEvaluator,
)
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.train.segment_evaluators import SegmentationEvaluator, SegmentationPictures
from mae_jax.train.segment_knn import SegmentKnnEvaluator
from mae_jax.utils.cpus import available_cpus


def make_evaluators(
    config: Config,
    task: Pretrain | SupervisedTask,
    *,
    train_source: Source,
    eval_source: Source | None,
    length: RunLength,
    mesh: jax.sharding.Mesh,
    writer: MetricsWriter,
    workdir: Path,
    init_key: Key[Array, ""],
    heartbeat: Callable[[str], None],
) -> list[Evaluator]:
    """Return the evaluators of a run for its task and its data.

    Args:
      init_key: PRNG key from which those of the random encoders are derived.
      heartbeat: called for every batch with what is being done.
    """
    evaluators: list[Evaluator] = []
    images = partial(make_eval_batches, config, mesh=mesh, heartbeat=heartbeat)
    every = {
        "accuracy": length.steps(config.eval.accuracy_every_epochs),
        "knn": length.steps(config.eval.knn_every_epochs),
        "pictures": length.steps(config.eval.pictures_every_epochs),
    }
    if isinstance(task, Pretrain):
        figure = _make_figure(config, task, eval_source or train_source)
        folder = workdir / "pictures"
        evaluators.append(ReconstructionEvaluator(figure, writer, folder, every["pictures"]))
        if config.eval.segment_knn:
            evaluators.append(_make_segment_knn(config, task, mesh, every["knn"], heartbeat))
    elif task.model.num_classes and eval_source is not None:
        batches = images(eval_source, num_classes=task.model.num_classes)
        if isinstance(task, Classify):
            evaluators.append(AccuracyEvaluator(task, batches, mesh, every["accuracy"]))
        if isinstance(task, Segment):
            names = class_names(config, train_source)
            evaluators += [
                SegmentationEvaluator(task, batches, mesh, every["accuracy"], names),
                _make_pictures(config, task, eval_source, writer, workdir, every["pictures"]),
            ]
    labeled = has_labels(train_source, eval_source)
    if config.eval.knn_every_epochs >= 0 and (labeled or config.eval.rankme):
        num_classes = len(train_source.classes) if labeled else None
        bank_size = config.eval.knn_bank if labeled else min(config.eval.knn_bank, MAX_IMAGES)
        queries = None
        if labeled:
            assert eval_source is not None
            shown = evenly_spaced(eval_source, config.eval.knn_queries)
            queries = images(shown, num_classes=num_classes)
        evaluators.append(
            FeatureEvaluator(
                task=task,
                bank=images(evenly_spaced(train_source, bank_size), num_classes=num_classes),
                queries=queries,
                num_classes=num_classes or 0,
                ks=tuple(config.eval.knn_k),
                temperature=config.eval.knn_temperature,
                mesh=mesh,
                every=every["knn"],
                linear=config.eval.linear,
                rankme=config.eval.rankme,
                baseline_key=init_key if config.eval.baselines else None,
                heartbeat=heartbeat,
            )
        )
    return evaluators


def has_labels(train_source: Source, eval_source: Source | None) -> bool:
    """Return whether there are labeled images to train on and to evaluate on, as k-NN needs."""
    return bool(train_source.classes and eval_source is not None and eval_source.classes)


def _make_segment_knn(
    config: Config,
    task: Pretrain,
    mesh: jax.sharding.Mesh,
    every: int | None,
    heartbeat: Callable[[str], None],
) -> SegmentKnnEvaluator:
    """Return the evaluator of patch k-NN; masks without class names are read once.

    Raises:
      UserError: the run has several processes, or a mask is bad.
    """
    if jax.process_count() > 1:
        raise config.eval.error("segment_knn", "is for runs of one process")
    bank = open_masks(config, config.data.train_split, None).evenly_spaced(config.eval.knn_bank)
    queries = open_masks(config, config.data.eval_split, None)
    num_classes = len(bank.class_names) or count_classes(bank, available_cpus())
    require_masks(queries, num_classes, available_cpus())
    return SegmentKnnEvaluator(
        task=task,
        bank=bank,
        queries=queries.evenly_spaced(config.eval.knn_queries),
        num_classes=num_classes,
        views=Views(
            config.model.image_size,
            config.model.channels,
            fill=(0.0,) * config.model.channels,  # of windows, which there are not
            bit_depth=config.data.bit_depth,
            options=config.data.read_options,
        ),
        batch_size=sharding.round_up_batch(config.eval.batch_size, mesh),
        mesh=mesh,
        every=every,
        heartbeat=heartbeat,
    )


def _make_figure(config: Config, task: Pretrain, source: Source) -> ReconstructionFigure:
    images = _shown_batch(config, source)["image"]
    mask = task.sample_mask(jax.random.key(0), len(images))  # the same in all figures of a run
    show = check_display_channels(config.eval.show_channels, config.model.channels)
    return ReconstructionFigure(task, images, mask, config.eval.stats, show)


def _make_pictures(
    config: Config,
    task: Segment,
    source: Source,
    writer: MetricsWriter,
    workdir: Path,
    every: int | None,
) -> SegmentationPictures:
    batch = _shown_batch(config, source)
    show = check_display_channels(config.eval.show_channels, config.model.channels)
    folder = workdir / "pictures"
    return SegmentationPictures(task, batch["image"], batch["mask"], show, writer, folder, every)


def _shown_batch(config: Config, source: Source) -> dict[str, np.ndarray]:
    """Return the images of figures, evenly spaced."""
    source = evenly_spaced(source, config.eval.pictures)
    skip, max_bad = config.data.on_bad == "skip", config.data.max_bad
    transform = make_eval_transform(config)
    batches = eval_batches(source, transform, len(source), skip=skip, max_bad=max_bad)
    return {name: np.asarray(array) for name, array in next(iter(batches)).items()}
