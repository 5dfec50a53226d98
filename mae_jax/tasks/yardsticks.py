"""Losses of predictions without a network: what a pretraining loss has to beat to mean anything."""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mae_jax.models.image_ops import normalize
from mae_jax.models.patches import enlarge_grid, patch_corners, patchify
from mae_jax.tasks.masking import Mask
from mae_jax.tasks.pretrain import Pretrain

DESCRIPTIONS = {
    "patch_mean": "each masked patch's own mean",
    "nearest": "a copy of the nearest visible patch",
    "interpolation": "bilinear interpolation of the visible patches",
}


def yardstick_losses(
    task: Pretrain, images: Iterable[Shaped[np.ndarray, "b h w c"]], mask: Mask
) -> dict[str, float]:
    """Compute the loss of predictions without a network, by name as in DESCRIPTIONS.

    They are compared with all masked patches, as those of the decoder are: with norm_pix all
    patches, also those of a prediction, are normalized, so that the mean of a patch becomes zeros,
    whose loss is about 1. The mean is that over all pixels and channels; with nodata, over those
    that have data, and the others count as the mean of their channel where a prediction uses them.

    Args:
      images: batches, all with the rows of `mask`.
    """
    to_images = jax.jit(partial(normalize, mean=task.mean, std=task.std, nodata=task.nodata))
    to_targets = jax.jit(lambda pixels, valid: task.to_targets(patchify(pixels, task.patch), valid))
    ids_keep, ids_masked = jax.device_get(mask)
    totals, counted, done = dict.fromkeys(DESCRIPTIONS, 0.0), 0.0, 0
    for batch in images:
        rows = slice(done, done + len(batch))
        pixels, valid = np.asarray(to_images(batch)), task.valid_values(jnp.asarray(batch))
        targets = np.asarray(to_targets(pixels, valid))
        share = (
            np.ones(targets.shape[:2], np.float32)
            if valid is None
            else np.asarray(valid.mean(axis=-1))
        )
        filled = fill_masked(pixels, visible_pixels(ids_keep[rows], task.grid, pixels.shape[1:3]))
        corners = patch_corners(task.grid, task.patch)
        predictions = {
            "patch_mean": (targets.mean(axis=-1) / np.where(share, share, 1))[..., None],
            "nearest": copy_nearest(targets, ids_keep[rows], corners),
            "interpolation": np.asarray(to_targets(filled, valid)),
        }
        for name, predicted in predictions.items():
            squared = np.square(predicted - targets)
            squared = (squared if valid is None else np.where(valid, squared, 0)).mean(axis=-1)
            totals[name] += float(np.take_along_axis(squared, ids_masked[rows], axis=1).sum())
        counted += float(np.take_along_axis(share, ids_masked[rows], axis=1).sum())
        done = rows.stop
    return {name: total / counted if counted else math.nan for name, total in totals.items()}


def copy_nearest(
    patches: Float[np.ndarray, "b n p"],
    ids_keep: Int[np.ndarray, "b k"],
    positions: Int[np.ndarray, "n 2"],
) -> Float[np.ndarray, "b n p"]:
    """Replace every patch by the nearest visible one, of several the first."""
    copied = np.empty_like(patches)
    for row, kept in enumerate(np.sort(ids_keep, axis=1)):
        squared = sum((a[:, None] - a[kept]) ** 2 for a in positions.T)
        copied[row] = patches[row, kept[np.argmin(squared, axis=1)]]
    return copied


def visible_pixels(
    ids_keep: Int[np.ndarray, "b k"], grid: tuple[int, int], image_size: tuple[int, int]
) -> Bool[np.ndarray, "b h w"]:
    """Return which pixels belong to visible patches."""
    visible = np.zeros((len(ids_keep), grid[0] * grid[1]), bool)
    np.put_along_axis(visible, ids_keep, True, axis=1)
    return enlarge_grid(visible.reshape(-1, *grid), image_size)


def fill_masked(
    images: Float[np.ndarray, "b h w c"], visible: Bool[np.ndarray, "b h w"]
) -> Float[np.ndarray, "b h w c"]:
    """Fill in masked pixels by bilinear upsampling of an image of half the size, filled likewise.

    A pixel of the smaller image is the mean of the visible ones among its four (the pull-push
    algorithm: Gortler et al. 1996, "The Lumigraph", section 3.4). One pixel must be visible.
    """
    if visible.all():
        return images
    height, width = visible.shape[1:]
    filled = _double(fill_masked(*_halve(images, visible)))[:, :height, :width]
    return np.where(visible[..., None], images, filled)


def _halve(images: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images of half the size, rounded up, and which of their pixels have visible ones."""
    odd = [(0, side % 2) for side in visible.shape[1:]]
    values = np.pad(images * visible[..., None], ((0, 0), *odd, (0, 0)))
    counts = np.pad(visible, ((0, 0), *odd)).astype(images.dtype)[..., None]
    totals, counts = (
        x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]
        for x in (values, counts)
    )
    return totals / np.maximum(counts, 1), counts[..., 0] > 0


def _double(images: np.ndarray) -> np.ndarray:
    """Upsample height and width by 2, bilinearly; edges are repeated."""
    for axis in (1, 2):
        x = np.moveaxis(images, axis, 0)
        before, after = np.concatenate([x[:1], x[:-1]]), np.concatenate([x[1:], x[-1:]])
        pair = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
        images = np.moveaxis(pair.reshape(-1, *x.shape[1:]), 0, axis)
    return images
