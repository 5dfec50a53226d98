"""Evaluators of semantic segmentation: mIoU, and pictures of predictions."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from mae_jax.distributed import processes, sharding
from mae_jax.distributed.inference import EvalBatches, global_num_valid, with_sharded_inputs
from mae_jax.evaluate.figures import image_grid, to_rgb_uint8
from mae_jax.evaluate.segmentation_figure import color_mask
from mae_jax.evaluate.segmentation_metrics import (
    SegmentationScore,
    count_pixels,
    segmentation_score,
)
from mae_jax.tasks.segment import Segment
from mae_jax.tasks.train_step import TrainState
from mae_jax.train.evaluators import Results, write_figure
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.utils import console


@dataclass(frozen=True)
class SegmentationEvaluator:
    """Computes mIoU and pixel accuracy, and those of the EMA parameters if there are any.

    Images and masks have the resolution of the model. Pixels of all images are counted together.

    class_names: of the IoU by class at the end; the numbers if empty.
    """

    task: Segment
    images: EvalBatches
    mesh: jax.sharding.Mesh
    every: int | None
    class_names: tuple[str, ...] = ()

    def run(self, step: int, state: TrainState) -> Results:
        """Return the fractions on the evaluation split."""
        del step
        return self._evaluate(state, show_progress=False)[0]

    def finish(self, step: int, state: TrainState) -> Results:
        """Return them with the IoU by class, the number of images and the seconds."""
        del step
        begin = time.perf_counter()
        results, score = self._evaluate(state, show_progress=True)
        names = self.class_names or tuple(map(str, range(len(score.iou))))
        return results | {
            "mean_accuracy": score.mean_accuracy,
            "class_iou": {n: x for n, x in zip(names, score.iou) if np.isfinite(x)},
            "eval_images": score.images,
            "eval_seconds": round(time.perf_counter() - begin, 2),
        }

    def _evaluate(
        self, state: TrainState, *, show_progress: bool
    ) -> tuple[Results, SegmentationScore]:
        score = self._score(state.params, state, show_progress)
        results: Results = {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy}
        if state.ema is not None:
            ema = self._score(state.ema, state, show_progress)
            results |= {"miou_ema": ema.miou, "pixel_accuracy_ema": ema.pixel_accuracy}
        return results, score

    def _score(self, params: Any, state: TrainState, show_progress: bool) -> SegmentationScore:
        predict = with_sharded_inputs(self._predict, self.mesh, params, state.batch_stats)
        classes, ignore = self.task.model.num_classes, self.task.ignore
        counts, images = np.zeros((classes, classes + 1), np.int64), 0
        batches = self.images.read()
        if show_progress:
            batches = console.progress(batches, self.images.count, count=global_num_valid)
        for batch in batches:
            outputs = (batch["valid"], batch["mask"], predict(batch["image"]))
            valid, truth, predicted = sharding.gather_to_host(outputs)
            counts += count_pixels(truth[valid], predicted[valid], classes, ignore)
            images += int(valid.sum())
        return segmentation_score(counts, images)

    @cached_property  # compiled once per run
    def _predict(self) -> Callable[..., Array]:
        return jax.jit(self.task.predict)


@dataclass(frozen=True)
class SegmentationPictures:
    """Draws images, masks and predictions to pictures/step_*.png.

    show: channels of images that are neither gray nor RGB.
    """

    task: Segment
    images: np.ndarray
    masks: np.ndarray
    show: tuple[int, ...]
    writer: MetricsWriter
    folder: Path
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Write a figure; all processes compute it together."""
        predicted = self._predict(state.params, state.batch_stats, self.images)
        if not predicted.is_fully_addressable:
            predicted = sharding.gather_to_host(predicted)
        if not processes.is_main():
            return {}
        images = to_rgb_uint8(self.images, self.show, self.task.mean, self.task.std)
        truth, prediction = (
            np.stack([color_mask(mask, self.task.model.num_classes) for mask in masks])
            for masks in (self._without_ignored(self.masks), np.asarray(predicted))
        )
        figure = image_grid([images, truth, prediction], ["image", "truth", "prediction"])
        return write_figure(figure, step, "segmentation", self.writer, self.folder)

    finish = run

    def _without_ignored(self, masks: np.ndarray) -> np.ndarray:
        return np.where(masks == self.task.ignore, -1, masks.astype(np.int32))

    @cached_property  # compiled once per run
    def _predict(self) -> Callable[..., Array]:
        return jax.jit(self.task.predict)
