"""k-nearest-neighbor (k-NN) accuracy of frozen features, without training."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

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

    Args:
      bank, bank_labels: features and labels of the training images.
      queries, labels: those of the images to classify.
    """
    if (bank_labels < 0).any():  # without label
        bank, bank_labels = bank[bank_labels >= 0], bank_labels[bank_labels >= 0]
    neighbors = NearestNeighbors(bank, bank_tile)
    max_k = min(max(ks), len(bank))
    rankings: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for _, rows in _tiles(query_tile, queries):
        cosines, index = neighbors.search(rows, max_k)
        nearest_labels = bank_labels[index]
        for k in ks:
            vote = partial(_vote, k=min(k, max_k), num_classes=num_classes)
            rankings[k].append(np.asarray(vote(cosines, nearest_labels, temperature)))
    return {k: accuracy(np.concatenate(r)[: len(labels)], labels) for k, r in rankings.items()}


class NearestNeighbors:
    """Exact nearest neighbors by cosine similarity.

    The device holds the bank, 4 n d bytes, and one tile of similarities.

    Args:
      bank: vectors to search.
      tile: number of them that are compared at a time.
    """

    def __init__(self, bank: Num[np.ndarray, "n d"], tile: int = BANK_TILE):
        self._bank = [
            (_unit(rows), start + np.arange(len(rows), dtype=np.int32))
            for start, rows in _tiles(tile, bank)
        ]
        self._count = len(bank)

    def search(
        self, queries: Num[np.ndarray, "q d"], k: int
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """Return cosines and indices of the k nearest (at most all), nearest first.

        Queries of as many rows each time are compiled once.
        """
        k = min(k, self._count)
        vectors = _unit(queries)
        nearest = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        for rows, index in self._bank:
            nearest = _merge_nearest(vectors, rows, index, self._count, *nearest)
        cosines, index = jax.device_get(nearest)
        return cosines, index


def _tiles(max_size: int, vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield starts and rows of as few tiles of one size as possible, the last with zeros to pad."""
    size = math.ceil(len(vectors) / math.ceil(len(vectors) / max_size))  # the least padding
    for start in range(0, len(vectors), size):
        tile = vectors[start : start + size]
        yield start, np.pad(tile, ((0, size - len(tile)), (0, 0)))


@jax.jit
def _unit(vectors: Array) -> Array:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@jax.jit
def _merge_nearest(
    queries: Array, bank: Array, index: Array, count: int, nearest: Array, nearest_index: Array
) -> tuple[Array, Array]:
    """Merge the nearest so far (cosines and indices, best first) with another tile of the bank.

    Rows of the bank from `count` on are padding.
    """
    cosines = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(index < count, cosines, -jnp.inf)
    in_tile, position = jax.lax.top_k(cosines, min(nearest.shape[1], len(bank)))
    cosines = jnp.concatenate([nearest, in_tile], axis=1)
    indices = jnp.concatenate([nearest_index, index[position]], axis=1)
    nearest, position = jax.lax.top_k(cosines, nearest.shape[1])
    return nearest, jnp.take_along_axis(indices, position, axis=1)


@partial(jax.jit, static_argnames=("k", "num_classes"))
def _vote(cosines: Array, labels: Array, temperature: float, *, k: int, num_classes: int) -> Array:
    """Return the classes with most votes of the k nearest, best first, then -1."""
    votes = jnp.zeros((len(cosines), num_classes))
    rows = jnp.arange(len(cosines))[:, None]
    # Relative to the nearest: the same order, without overflow.
    weights = jnp.exp((cosines[:, :k] - cosines[:, :1]) / temperature)
    votes = votes.at[rows, labels[:, :k]].add(weights)
    return top_k(jnp.where(votes > 0, votes, -jnp.inf))
