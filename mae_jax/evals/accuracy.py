"""Accuracy of a classifier over a whole data set, whatever the batch and the number of devices."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array

from mae_jax.evals.extract import extract
from mae_jax.evals.scores import TOP, Score, score_of

Logits = Callable[[np.ndarray], Array]  # images uint8 [b, h, w, c] -> [b, classes]


@dataclass(frozen=True)
class Accuracy:
    """Scores over at most `count` images that come in batches with a "valid" mask."""

    count: int
    batches: Callable[[], Iterable[dict[str, np.ndarray]]]

    def run(self, logits: Logits) -> Score:
        """The score of logits; every image counts once."""

        def rank(images: np.ndarray) -> dict[str, Array]:
            return {"ranking": ranked(logits(images))}

        found, labels = extract(rank, self.batches(), self.count)
        return score_of(found["ranking"], labels)


@jax.jit
def ranked(logits: Array) -> Array:
    """The best classes of each row, best first, five where there are so many."""
    return jax.lax.top_k(logits, min(TOP, logits.shape[-1]))[1]
