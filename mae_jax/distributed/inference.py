"""Features of every image of a data set, in memory."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mae_jax.distributed import sharding

FeaturesFn = Callable[[np.ndarray], Mapping[str, Any]]  # images [b, h, w, c] -> [b, ...]


@dataclass(frozen=True)
class EvalBatches:
    """At most `count` labelled images, which `read` gives in batches with a "valid" mask.

    Of every batch a process reads its own rows.
    """

    count: int
    read: Callable[[], Iterable[dict[str, np.ndarray]]]


def extract_features(
    features: FeaturesFn, images: EvalBatches
) -> tuple[dict[str, Float[np.ndarray, "n ..."]], Int[np.ndarray, " n"]]:
    """Features by name, and the labels, of all valid images, in order, on every process.

    Each array is allocated once, so memory holds features only once.
    """
    found: dict[str, np.ndarray] = {}
    labels, done = np.zeros(images.count, np.int32), 0
    for batch in images.read():
        made = dict(features(batch["image"]))
        valid, label, made = sharding.gather_to_host((batch["valid"], batch["label"], made))
        rows = slice(done, done + int(valid.sum()))
        labels[rows] = label[valid]
        for name, values in made.items():
            if name not in found:
                found[name] = np.empty((images.count, *values.shape[1:]), values.dtype)
            found[name][rows] = values[valid]
        done = rows.stop
    return {name: array[:done] for name, array in found.items()}, labels[:done]
