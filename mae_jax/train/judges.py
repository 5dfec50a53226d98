"""What a run is judged by, and how often."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.data.loader import eval_batches
from mae_jax.data.sources import Source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.evaluate.figures import PATCH_STATS, ReconstructionFigure, check_display_channels
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train import Config
from mae_jax.train.build_data import make_eval_batches, make_eval_transform
from mae_jax.train.evaluators import (
    AccuracyEvaluator,
    Evaluator,
    FeatureEvaluator,
    ReconstructionEvaluator,
)
from mae_jax.train.metrics_writer import MetricsLogger
from mae_jax.train.schedule import RunLength


def check_evaluation(config: Config) -> None:
    """ValueError for cadences, numbers and kinds of evaluation that cannot be."""
    flat = config.to_dict()
    counts = {
        "log": ("every_steps",),
        "checkpoint": ("every_steps", "max_to_keep"),
        "eval": ("pictures", "batch_size", "knn_bank", "knn_queries"),
    }
    for group, keys in counts.items():
        for key in keys:
            if flat[group][key] < 1:
                raise ValueError(f"{group}.{key}={flat[group][key]} must be at least 1")
    ks = tuple(config.eval.knn_k)
    if not ks or any(type(k) is not int or k < 1 for k in ks):
        raise ValueError(f"eval.knn_k={ks} must be numbers from 1 up, as in (10,)")
    if config.eval.stats not in PATCH_STATS:
        raise ValueError(f"eval.stats={config.eval.stats!r}; use one of {', '.join(PATCH_STATS)}")
    if config.data.eval_crop is not None and not 0 < config.data.eval_crop <= 1:
        raise ValueError(f"data.eval_crop={config.data.eval_crop} must lie above 0, up to 1")
    check_display_channels(config.eval.show_channels, config.model.channels)
    if config.eval.knn_temperature <= 0:
        raise ValueError(f"eval.knn_temperature={config.eval.knn_temperature} must be above 0")


def make_evaluators(
    config: Config,
    task: Pretrain | Classify,
    *,
    train_source: Source,
    eval_source: Source | None,
    duration: RunLength,
    mesh: jax.sharding.Mesh,
    run_log: MetricsLogger,
    workdir: Path,
    init_key: Key[Array, ""],
    note: Callable[[str], None],
) -> list[Evaluator]:
    """The evaluators of a run, none of which has to know what the run trains.

    `note` is told of every batch that they look at.
    """
    evaluators: list[Evaluator] = []
    alone = duration.total_steps == 0  # without a training loop, which has a progress bar
    images = partial(make_eval_batches, config, mesh=mesh, show=alone, note=note)
    every = {
        kind: duration.steps(config.eval[f"{kind}_every_epochs"])
        for kind in ("accuracy", "knn", "pictures")
    }
    if isinstance(task, Pretrain):
        pictures = _make_pictures(config, task, eval_source or train_source)
        folder = workdir / "pictures"
        evaluators.append(ReconstructionEvaluator(pictures, run_log, folder, every["pictures"]))
    elif task.model.num_classes and eval_source is not None:
        read = images(eval_source, num_classes=task.model.num_classes)
        evaluators.append(AccuracyEvaluator(task, read, mesh, every["accuracy"]))
    if features_enabled(config, train_source, eval_source):
        assert eval_source is not None
        classes = len(train_source.classes)
        bank = evenly_spaced(train_source, config.eval.knn_bank)
        queries = evenly_spaced(eval_source, config.eval.knn_queries)
        evaluators.append(
            FeatureEvaluator(
                task=task,
                bank=images(bank, num_classes=classes),
                queries=images(queries, num_classes=classes),
                num_classes=classes,
                ks=tuple(config.eval.knn_k),
                temperature=config.eval.knn_temperature,
                mesh=mesh,
                every=every["knn"],
                linear=config.eval.linear,
                baseline_key=init_key if config.eval.baselines else None,
                note=note,
            )
        )
    return evaluators


def features_enabled(config: Config, train_source: Source, eval_source: Source | None) -> bool:
    """Whether k-NN is asked for, and has labels and images to measure it on."""
    wanted = config.eval.knn_every_epochs >= 0
    labelled = bool(train_source.classes and eval_source is not None and eval_source.classes)
    return wanted and labelled


def _make_pictures(config: Config, task: Pretrain, source: Source) -> ReconstructionFigure:
    # Pictures show the same images under the same masks over the whole run.
    source = evenly_spaced(source, config.eval.pictures)
    skip, max_bad = config.data.on_bad == "skip", config.data.max_bad
    transform = make_eval_transform(config)
    batches = eval_batches(source, transform, len(source), skip=skip, max_bad=max_bad)
    batch = next(iter(batches))
    mask = task.draw_mask(jax.random.key(0), len(source))
    show = check_display_channels(config.eval.show_channels, config.model.channels)
    return ReconstructionFigure(task, np.asarray(batch["image"]), mask, config.eval.stats, show)
