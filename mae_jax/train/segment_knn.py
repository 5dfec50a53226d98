"""Patch k-NN of segmentation during pretraining, on images with masks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jaxtyping import Array

from mae_jax.data.segmentation import SegmentationSource
from mae_jax.distributed.inference import with_sharded_inputs
from mae_jax.evaluate.segmentation import SegmentationSetup, evaluate_probes, extract_patches
from mae_jax.evaluate.segmentation_probes import KnnOptions, knn_probe
from mae_jax.evaluate.segmentation_views import Views
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState

ENCODER = "encoder"


@dataclass(frozen=True, kw_only=True)
class SegmentKnnEvaluator:
    """Computes mIoU and pixel accuracy of the k-NN of patches; see `mae_jax.evaluate.segmentation`.

    Args:
      bank: images from whose patches the classes are taken.
      queries: images to segment.
      views: how both are read.
      batch_size: images at a time.
    """

    task: Pretrain
    bank: SegmentationSource
    queries: SegmentationSource
    num_classes: int
    views: Views
    batch_size: int
    mesh: jax.sharding.Mesh
    every: int | None
    heartbeat: Callable[[str], None] = lambda _: None

    def run(self, step: int, state: TrainState) -> dict[str, Any]:
        """Return the mIoU and the pixel accuracy of the encoder."""
        del step
        self.heartbeat("k-NN of patches")
        grids = with_sharded_inputs(self._grids, self.mesh, state.params)
        setup = SegmentationSetup(
            grids=grids,
            views=self.views,
            batch_size=self.batch_size,
            patch=self.task.patch,
            num_classes=self.num_classes,
            ignore=self.bank.ignore,
            show_progress=False,
        )
        options = KnnOptions()
        patches = extract_patches(setup, self.bank, keep_grids=False, bank=options.bank)
        probe = knn_probe(patches.bank[ENCODER], patches.bank_masks, setup, options)
        name = ("segment_knn", ENCODER)
        score = evaluate_probes(setup, self.queries, {name: probe})[0][name]
        return {"segment_knn_miou": score.miou, "segment_knn_accuracy": score.pixel_accuracy}

    finish = run

    @cached_property  # compiled once per run
    def _grids(self) -> Callable[..., dict[str, Array]]:
        return jax.jit(lambda params, images: {ENCODER: self.task.grid_features(params, images)})
