"""k-nearest-neighbour accuracy: what features are worth without training anything on them."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mae_jax.evaluate.metrics import Score, accuracy, top_k

QUERY_TILE = 1024  # queries compared at once ...
BANK_TILE = 65_536  # ... with so many of the bank: 268 MB of similarities


def knn_scores(
    bank: Float[np.ndarray, "n d"],
    bank_labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "q d"],
    labels: Int[np.ndarray, " q"],
    *,
    num_classes: int,
    ks: Sequence[int] = (10,),
    temperature: float = 0.07,
    query_tile: int = QUERY_TILE,
    bank_tile: int = BANK_TILE,
) -> dict[int, Score]:
    """Scores where the k nearest vote for their class, for each k (at most the bank's size).

    Neighbours by cosine vote with weight exp(cosine / temperature) (Wu et al. 2018). On the device
    are the bank, 4 n d bytes, and one tile of similarities.
    """
    most = min(max(ks), len(bank))
    tiles = [
        (_unit(vectors), jnp.asarray(tile_labels))
        for vectors, tile_labels in _tiles(min(bank_tile, len(bank)), bank, bank_labels)
    ]
    rankings: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for rows, _ in _tiles(min(query_tile, len(queries)), queries, labels):
        vectors = _unit(rows)
        near = jnp.full((len(rows), most), -jnp.inf), jnp.zeros((len(rows), most), jnp.int32)
        for tile in tiles:
            near = _nearest(vectors, *tile, *near)
        for k in ks:
            ranking = _vote(*near, temperature, k=min(k, most), num_classes=num_classes)
            rankings[k].append(np.asarray(ranking))
    return {k: accuracy(np.concatenate(r)[: len(labels)], labels) for k, r in rankings.items()}


def _tiles(
    size: int, vectors: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows in tiles of one size; the last is filled up with zeros of label -1."""
    for start in range(0, len(vectors), size):
        part, part_labels = vectors[start : start + size], labels[start : start + size]
        fill = size - len(part)
        yield np.pad(part, ((0, fill), (0, 0))), np.pad(part_labels, (0, fill), constant_values=-1)


@jax.jit
def _unit(vectors: Array) -> Array:
    vectors = vectors.astype(jnp.float32)
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@jax.jit
def _nearest(
    queries: Array, bank: Array, bank_labels: Array, near: Array, near_labels: Array
) -> tuple[Array, Array]:
    """The nearest so far (cosines and labels, best first), and in a further tile of the bank."""
    cosines = jnp.matmul(queries, bank.T, precision=jax.lax.Precision.HIGHEST)
    cosines = jnp.where(bank_labels >= 0, cosines, -jnp.inf)
    of_tile, index = jax.lax.top_k(cosines, min(near.shape[1], len(bank)))
    both = jnp.concatenate([near, of_tile], axis=1)
    labels = jnp.concatenate([near_labels, bank_labels[index]], axis=1)
    near, index = jax.lax.top_k(both, near.shape[1])
    return near, jnp.take_along_axis(labels, index, axis=1)


@partial(jax.jit, static_argnames=("k", "num_classes"))
def _vote(near: Array, labels: Array, temperature: float, *, k: int, num_classes: int) -> Array:
    """The classes with most votes of the k nearest, best first; -1 where there are no more."""
    votes = jnp.zeros((len(near), num_classes))
    rows = jnp.arange(len(near))[:, None]
    # The nearest votes with 1, the others with less: the order is the same, and nothing overflows.
    weights = jnp.exp((near[:, :k] - near[:, :1]) / temperature)
    votes = votes.at[rows, labels[:, :k]].add(weights)
    return top_k(jnp.where(votes > 0, votes, -jnp.inf))
