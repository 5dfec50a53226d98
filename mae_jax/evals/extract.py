"""Features of every image of a data set, in memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

FeaturesFn = Callable[[np.ndarray], Mapping[str, Any]]  # images [b, h, w, c] -> [b, ...]


@dataclass(frozen=True)
class Images:
    """At most `count` labelled images, which `read` gives in batches with a "valid" mask."""

    count: int
    read: Callable[[], Iterable[dict[str, np.ndarray]]]


def extract(
    features: FeaturesFn, images: Images
) -> tuple[dict[str, Float[np.ndarray, "n ..."]], Int[np.ndarray, " n"]]:
    """Features by name, and the labels, of all valid images, in order.

    Each array is allocated once, so memory holds features only once.
    """
    found: dict[str, np.ndarray] = {}
    labels, done = np.zeros(images.count, np.int32), 0
    for batch in images.read():
        valid = batch["valid"]
        rows = slice(done, done + int(valid.sum()))
        labels[rows] = batch["label"][valid]
        for name, made in features(batch["image"]).items():
            made = np.asarray(made)
            if name not in found:
                found[name] = np.empty((images.count, *made.shape[1:]), made.dtype)
            found[name][rows] = made[valid]
        done = rows.stop
    return {name: array[:done] for name, array in found.items()}, labels[:done]
