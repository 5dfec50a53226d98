"""k-nearest-neighbor (k-NN) accuracy of frozen features, without training."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from mae_jax.evaluate.metrics import Score, accuracy, top_k

QUERY_TILE = 1024  # queries at a time, against ...
BANK_TILE = 65_536  # ... a tile of the bank: 268 MB of similarities


def knn_scores(
    bank: Num[np.ndarray, "n d"],
    bank_labels: Int[np.ndarray, " n"],
    queries: Num[np.ndarray, "q d"],
    labels: Int[np.ndarray, " q"],
    *,
    num_classes: int,
    ks: Sequence[int] = (10,),
    temperature: float = 0.07,
    query_tile: int = QUERY_TILE,
    bank_tile: int = BANK_TILE,
) -> dict[int, Score]:
    """Return the scores of weighted k-NN classification for each k (at most the bank's size).

    The k nearest by cosine similarity vote with weight exp(cosine / temperature) (Wu et al. 2018).
    The device holds the bank, 4 n d bytes, and one tile of similarities.

    Args:
      bank, bank_labels: features and labels of the training images.
      queries, labels: those of the images to classify.
    """
    max_k = min(max(ks), len(bank))
    tiles = [
        (_unit(vectors), jnp.asarray(tile_labels))
        for vectors, tile_labels in _tiles(bank_tile, bank, bank_labels)
    ]
    rankings: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for rows, _ in _tiles(query_tile, queries, labels):
        vectors = _unit(rows)
        nearest = jnp.full((len(rows), max_k), -jnp.inf), jnp.zeros((len(rows), max_k), jnp.int32)
        for tile in tiles:
            nearest = _merge_nearest(vectors, *tile, *nearest)
        for k in ks:
            ranking = _vote(*nearest, temperature, k=min(k, max_k), num_classes=num_classes)
            rankings[k].append(np.asarray(ranking))
    return {k: accuracy(np.concatenate(r)[: len(labels)], labels) for k, r in rankings.items()}


def _tiles(
    max_size: int, vectors: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows in as few tiles of one size as possible; the last has zeros of label -1 to pad."""
    size = math.ceil(len(vectors) / math.ceil(len(vectors) / max_size))  # the least padding
    for start in range(0, len(vectors), size):
        tile, tile_labels = vectors[start : start + size], labels[start : start + size]
        padding = (0, size - len(tile))
        yield np.pad(tile, (padding, (0, 0))), np.pad(tile_labels, padding, constant_values=-1)


@jax.jit
def _unit(vectors: Array) -> Array:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@jax.jit
def _merge_nearest(
    queries: Array, bank: Array, bank_labels: Array, nearest: Array, nearest_labels: Array
) -> tuple[Array, Array]:
    """Merge the nearest so far (cosines and labels, best first) with another tile of the bank."""
    cosines = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(bank_labels >= 0, cosines, -jnp.inf)
    in_tile, index = jax.lax.top_k(cosines, min(nearest.shape[1], len(bank)))
    cosines = jnp.concatenate([nearest, in_tile], axis=1)
    labels = jnp.concatenate([nearest_labels, bank_labels[index]], axis=1)
    nearest, index = jax.lax.top_k(cosines, nearest.shape[1])
    return nearest, jnp.take_along_axis(labels, index, axis=1)


@partial(jax.jit, static_argnames=("k", "num_classes"))
def _vote(cosines: Array, labels: Array, temperature: float, *, k: int, num_classes: int) -> Array:
    """Return the classes with most votes of the k nearest, best first, then -1."""
    votes = jnp.zeros((len(cosines), num_classes))
    rows = jnp.arange(len(cosines))[:, None]
    # Relative to the nearest: the same order, without overflow.
    weights = jnp.exp((cosines[:, :k] - cosines[:, :1]) / temperature)
    votes = votes.at[rows, labels[:, :k]].add(weights)
    return top_k(jnp.where(votes > 0, votes, -jnp.inf))
