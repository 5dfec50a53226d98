"""Top-1 and top-5 accuracy, with confidence intervals."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TOP = 5  # of top-5 accuracy
Z95 = 1.959964  # standard deviations of a 95 % confidence interval


@dataclass(frozen=True)
class Score:
    """Fractions, 0..1, of `images` whose label is ranked first, or among the first five."""

    top1: float
    top5: float
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % confidence interval of top1, for independent images."""
        n, p = self.images, self.top1
        center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(center - half, 0.0), min(center + half, 1.0)


def top_k(logits: Float[Array, "b classes"]) -> Int[Array, "b r"]:
    """Return the five best classes of each row (or all, if fewer), best first.

    Classes with a NaN/Inf logit are replaced by -1.
    """
    best, index = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    return jnp.where(jnp.isfinite(best), index, -1)


def accuracy(ranking: Int[np.ndarray, "n r"], labels: Int[np.ndarray, " n"]) -> Score:
    """Return the accuracy of classes ranked by `top_k`."""
    hits = ranking[:, :TOP] == labels[:, None]
    return Score(float(hits[:, 0].mean()), float(hits.any(axis=1).mean()), len(labels))
