"""Accuracies, and how sure they are."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TOP = 5  # ranks that count for the second accuracy
Z95 = 1.959964  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Score:
    """Shares, 0..1, of `images` whose label was ranked first, or among the first five."""

    top1: float
    top5: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval of top1, for images drawn independently."""
        n, p = self.images, self.top1
        centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(centre - half, 0.0), min(centre + half, 1.0)


def top_k(logits: Float[Array, "b classes"]) -> Int[Array, "b r"]:
    """The best classes of each row, best first, five where there are so many.

    -1, which is no class, stands for those whose logit is not a finite number.
    """
    best, index = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return jnp.where(jnp.isfinite(best), index, -1)


def accuracy(ranking: Int[np.ndarray, "n r"], labels: Int[np.ndarray, " n"]) -> Score:
    """The score of classes ranked best first, as `ranked` gives them."""
    hits = ranking[:, :TOP] == labels[:, None]
    return Score(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), len(labels))
