"""k-nearest-neighbour accuracy: what features are worth without training anything on them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

FeatureFn = Callable[[np.ndarray], Any]  # images uint8 [b, h, w, c] -> features [b, d]


def extract(
    features: Mapping[str, FeatureFn], batches: Iterable[dict[str, np.ndarray]]
) -> tuple[dict[str, Float[np.ndarray, "n d"]], Int[np.ndarray, " n"]]:
    """Several kinds of features, by name, and the labels of every "valid" record, in order."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in features}
    labels = []
    for batch in batches:
        for name, function in features.items():
            rows[name].append(np.asarray(function(batch["image"]))[batch["valid"]])
        labels.append(batch["label"][batch["valid"]])
    return {name: np.concatenate(r) for name, r in rows.items()}, np.concatenate(labels)


@dataclass(frozen=True)
class Knn:
    """k-NN accuracy on `queries` with the labelled `bank`; both make an iterable of batches."""

    bank: Callable[[], Iterable[dict[str, np.ndarray]]]
    queries: Callable[[], Iterable[dict[str, np.ndarray]]]
    k: int
    temperature: float

    def run(self, features: Mapping[str, FeatureFn]) -> dict[str, float]:
        """Accuracy, 0..1, of each kind of features; images are read once for all of them."""
        bank, bank_labels = extract(features, self.bank())
        queries, labels = extract(features, self.queries())
        return {
            name: knn_accuracy(
                bank[name],
                bank_labels,
                queries[name],
                labels,
                k=self.k,
                temperature=self.temperature,
            )
            for name in features
        }


@partial(jax.jit, static_argnames=("k", "num_classes"))
def _vote(queries, bank, bank_labels, temperature, *, k, num_classes):
    similarity, index = jax.lax.top_k(queries @ bank.T, k)
    weights = jnp.exp(similarity / temperature)
    votes = jax.nn.one_hot(bank_labels[index], num_classes) * weights[..., None]
    return votes.sum(axis=1).argmax(axis=1)


def knn_accuracy(
    bank: Float[np.ndarray, "n d"],
    bank_labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "q d"],
    query_labels: Int[np.ndarray, " q"],
    *,
    k: int,
    temperature: float,
    tile: int = 1024,
) -> float:
    """Share of queries whose neighbours elect the right class.

    The k nearest by cosine vote with weight exp(cosine / temperature) (Wu et al. 2018). A tile is
    the number of queries whose similarities to the whole bank are in memory at once.
    """
    k = min(k, len(bank))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    num_classes = int(max(bank_labels.max(), query_labels.max())) + 1
    labelled_bank = jnp.asarray(bank), jnp.asarray(bank_labels)
    right = 0
    for start in range(0, len(queries), tile):
        rows = slice(start, start + tile)
        elected = _vote(queries[rows], *labelled_bank, temperature, k=k, num_classes=num_classes)
        right += int((np.asarray(elected) == query_labels[rows]).sum())
    return right / len(queries)
