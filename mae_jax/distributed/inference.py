"""Inference over all images of a dataset, on all devices."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Int, Shaped

from mae_jax.distributed import sharding
from mae_jax.utils import console
from mae_jax.utils.cpus import available_cpus

SLICE_ROWS = 64  # images that a thread of a CPU computes ...
CHUNK_ROWS = 8  # ... so many at a time, whose activations fit in the core's cache

FeaturesFn = Callable[[np.ndarray], Mapping[str, Any]]  # images [b, h, w, c] -> [b, ...] by name


@dataclass(frozen=True)
class EvalBatches:
    """At most `count` labeled images.

    Args:
      read: returns batches of "image", "label" and "valid", which is False for padding; every
        process reads its own rows.
    """

    count: int
    read: Callable[[], Iterable[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class LabeledFeatures:
    """Features by name, one row per image, and the labels of the images."""

    features: dict[str, Shaped[np.ndarray, "n ..."]]
    labels: Int[np.ndarray, " n"]


def with_sharded_inputs(
    function: Callable[..., Any], mesh: jax.sharding.Mesh, *state: Any
) -> Callable[[np.ndarray], Any]:
    """Return `function(*state, images)` as a function of images, sharded over all devices.

    Args:
      function: jitted, of a state and a batch of images.
    """
    if mesh.size == 1 and mesh.devices.flat[0].platform == "cpu":
        return partial(_in_slices, function, state)
    return lambda images: function(*state, sharding.shard_batch({"image": images}, mesh)["image"])


def _in_slices(function: Callable[..., Any], state: tuple[Any, ...], images: np.ndarray) -> Any:
    """Apply a function to slices of images, one per core at a time; return all rows on the host.

    Faster than all cores computing every layer of all images together. Batches of other sizes than
    multiples of SLICE_ROWS are not sliced: each shape is compiled.
    """
    if len(images) % SLICE_ROWS:
        return function(*state, images)
    slices = np.split(images, len(images) // SLICE_ROWS)
    with ThreadPoolExecutor(available_cpus()) as pool:
        compute = lambda rows: jax.device_get(_in_chunks(function, state, rows))
        parts = list(pool.map(compute, slices))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@partial(jax.jit, static_argnums=0)
def _in_chunks(function: Callable[..., Any], state: tuple[Any, ...], images: Array) -> Any:
    chunks = rearrange(images, "(n b) ... -> n b ...", b=CHUNK_ROWS)
    outputs = jax.lax.map(lambda chunk: function(*state, chunk), chunks)
    return jax.tree.map(lambda x: rearrange(x, "n b ... -> (n b) ..."), outputs)


def extract_features(
    features_fn: FeaturesFn, images: EvalBatches, *, show_progress: bool = False
) -> LabeledFeatures:
    """Compute the features of all valid images, in order, on every process.

    Each array is allocated once, for all images.
    """
    batches = images.read()
    if show_progress:
        batches = console.progress(batches, images.count, count=global_num_valid)
    features: dict[str, np.ndarray] = {}
    labels, done = np.zeros(images.count, np.int32), 0
    for batch in batches:
        outputs = dict(features_fn(batch["image"]))
        valid, label, outputs = sharding.gather_to_host((batch["valid"], batch["label"], outputs))
        rows = slice(done, done + int(valid.sum()))
        labels[rows] = label[valid]
        for name, values in outputs.items():
            if name not in features:
                features[name] = np.empty((images.count, *values.shape[1:]), values.dtype)
            features[name][rows] = values[valid]
        done = rows.stop
    return LabeledFeatures({name: x[:done] for name, x in features.items()}, labels[:done])


def global_num_valid(batch: Mapping[str, np.ndarray]) -> int:
    """Estimate the number of images over all processes from that of this one."""
    return console.num_valid(batch) * jax.process_count()
