"""Segmentation probes on features of patches: k nearest neighbors, and a linear head."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int

from mae_jax.data.sources import DataError
from mae_jax.evaluate.knn import NearestNeighbors
from mae_jax.evaluate.segmentation import Probe, SegmentationSetup
from mae_jax.models.segmentation import LinearHead
from mae_jax.tasks.segment import SegmentationProbe
from mae_jax.tasks.train_step import TrainState, init_state, make_train_step
from mae_jax.utils import console
from mae_jax.utils.sides import height_width

POWER = 0.9  # of the polynomial decay of the learning rate
UNLABELED = "no patch of the training images has labeled pixels: check the masks and --ignore"


@dataclass(frozen=True)
class KnnOptions:
    """Settings of segment_knn.

    bank: maximum number of training patches, a sample of all.
    """

    k: int = 30
    temperature: float = 0.07
    bank: int = 200_000
    seed: int = 0


@dataclass(frozen=True)
class LinearOptions:
    """Settings of segment_linear; the learning rate decays polynomially."""

    epochs: int = 60
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    batch_size: int = 16
    seed: int = 0


def knn_probe(
    bank: Float[np.ndarray, "m d"],
    masks: Int[np.ndarray, "m p"],
    setup: SegmentationSetup,
    options: KnnOptions,
) -> Probe:
    """Return a probe by the votes of the k nearest patches of a bank, by cosine similarity.

    A neighbor votes with weight exp(cosine / temperature), as in `knn_scores`: for each class in
    proportion to its labeled pixels, or, by the convention "capi", see `pixel_knn_probe`.

    Raises:
      DataError: no patch has a labeled pixel.
    """
    if setup.convention == "capi":
        return pixel_knn_probe(bank, masks, setup, options.k)
    fractions = class_fractions(masks, setup.num_classes, setup.ignore)
    labeled = fractions.any(axis=1)
    if not labeled.any():
        raise DataError(UNLABELED)
    neighbors, fractions = NearestNeighbors(bank[labeled]), fractions[labeled]

    def probe(grid: Float[np.ndarray, "v y x d"]) -> Float[np.ndarray, "v y x classes"]:
        cosines, index = neighbors.search(grid.reshape(-1, grid.shape[-1]), options.k)
        weights = np.exp((cosines - cosines[:, :1]) / options.temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        votes = np.einsum("qk,qkc->qc", weights, fractions[index])
        return votes.reshape(*grid.shape[:-1], -1)

    return probe


def class_fractions(
    masks: Int[np.ndarray, "m p"], num_classes: int, ignore: int
) -> Float[np.ndarray, "m classes"]:
    """Return the fraction of each class in the labeled pixels of patches; 0 without any."""
    counts = _count_classes(masks, num_classes, ignore)[:, :-1]
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _count_classes(
    masks: Int[np.ndarray, "m p"], num_classes: int, ignore: int
) -> Float[np.ndarray, "m classes1"]:
    """Return the number of pixels of each class, and of those that are ignored, by patch."""
    columns = np.where(masks == ignore, num_classes, masks).astype(int)
    cells = np.arange(len(masks))[:, None] * (num_classes + 1) + columns
    counts = np.bincount(cells.ravel(), minlength=len(masks) * (num_classes + 1))
    return counts.reshape(len(masks), -1).astype(np.float32)


def pixel_knn_probe(
    bank: Float[np.ndarray, "m d"], masks: Int[np.ndarray, "m p"], setup: SegmentationSetup, k: int
) -> Probe:
    """Return the k-NN probe of CAPI (Darcet et al. 2025), which predicts pixels.

    Features are standardized. Each pixel takes the most frequent class of that pixel in the k
    nearest patches; of several the smallest number, and ignored pixels vote for the last column.
    Training patches that are mostly ignored are left out.
    """
    mean, std = bank.mean(axis=0, dtype=np.float64), bank.std(axis=0, dtype=np.float64)
    standardize = lambda x: ((x - mean) / np.where(std > 0, std, 1)).astype(np.float32)
    counts = _count_classes(masks, setup.num_classes, setup.ignore)
    kept = counts.argmax(axis=1) < setup.num_classes
    if not kept.any():
        raise DataError(UNLABELED)
    neighbors, masks = NearestNeighbors(standardize(bank[kept])), masks[kept]
    columns = np.where(masks == setup.ignore, setup.num_classes, masks).astype(int)

    def probe(grid: Float[np.ndarray, "v y x d"]) -> Float[np.ndarray, "v h w classes1"]:
        _, index = neighbors.search(standardize(grid.reshape(-1, grid.shape[-1])), k)
        votes = columns[index].swapaxes(1, 2).reshape(-1, index.shape[1])  # by pixel
        counts = _count_classes(votes, setup.num_classes, setup.num_classes)
        counts = counts.reshape(*grid.shape[:-1], *height_width(setup.patch), -1)
        return rearrange(counts, "v y x p q c -> v (y p) (x q) c")

    return probe


def linear_probe(
    grids: Float[np.ndarray, "n y x d"],
    masks: Int[np.ndarray, "n h w"],
    setup: SegmentationSetup,
    options: LinearOptions,
) -> Probe:
    """Train a linear head on the features of all patches; return the probe.

    The loss is that of the logits at the resolution of the model.
    """
    if (masks == setup.ignore).all():
        raise DataError(UNLABELED)
    task = SegmentationProbe(
        LinearHead(setup.num_classes), grids.shape[1:], setup.ignore, setup.align_corners
    )
    count, size = len(grids), min(options.batch_size, len(grids))
    learning_rate = polynomial_decay(options.learning_rate, options.epochs * (count // size))
    tx = probe_optimizer(learning_rate, options.weight_decay)
    init_key, order_key, step_key = jax.random.split(jax.random.key(options.seed), 3)
    step = make_train_step(task, tx, learning_rate, step_key)

    @jax.jit
    def train_epoch(state: TrainState, epoch: int, grids: Array, masks: Array) -> TrainState:
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), count)

        def train_step(state: TrainState, rows: Array) -> tuple[TrainState, None]:
            return step(state, {"grid": grids[rows], "mask": masks[rows]})[0], None

        batches = order[: count // size * size].reshape(-1, size)
        return jax.lax.scan(train_step, state, batches)[0]

    state, arrays = init_state(task, tx, init_key), (jnp.asarray(grids), jnp.asarray(masks))
    for epoch in console.progress(range(options.epochs), options.epochs, "epochs"):
        state = jax.block_until_ready(train_epoch(state, epoch, *arrays))
    logits = jax.jit(partial(task.logits, state.params, state.batch_stats))
    return lambda grid: np.asarray(logits(grid))


def polynomial_decay(peak: float, total_steps: int) -> optax.Schedule:
    """Return the learning rate by step, peak * (1 - done)^0.9, as in pixio's evaluation.

    There it is set after a step, so that the first two steps have the same one.
    """
    return lambda step: peak * (1 - jnp.maximum(step - 1, 0) / total_steps) ** POWER


def probe_optimizer(
    learning_rate: optax.Schedule, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """Return AdamW as in pixio's evaluation: torch's defaults, which decay all parameters."""
    return optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
