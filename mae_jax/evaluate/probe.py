"""Linear and attentive probes on precomputed features, trained in seconds.

Features are of images as in evaluation, without augmentation, and must fit into memory.
`configs/linprobe.py` is the paper's protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from mae_jax.evaluate.metrics import Score, accuracy, top_k
from mae_jax.models.classifier import Probe
from mae_jax.tasks.classify import ProbeTask
from mae_jax.tasks.optimizer import lars, warmup_cosine
from mae_jax.tasks.train_step import TrainState, init_state, make_train_step

TEST_BATCH = 1024  # images to classify at a time
WARMUP_FRACTION, MOMENTUM = 1 / 9, 0.9


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe:
    """Hyperparameters of the paper's linear probe (Table 10), for any number of images.

    learning_rate: the peak, 0.1 * 16384 / 256 = 6.4 in the paper. A LARS step is a fraction of the
    norm of the weights, so smaller batches need the same rate: with 0.1 * batch / 256 the weights,
    which start small, would not grow to convergence.
    """

    epochs: float = 90.0  # the first ninth is warm-up
    learning_rate: float = 6.4
    seed: int = 0


def batch_size_for(count: int) -> int:
    """Return 1/32 of the images, so 32 steps per epoch; at least 8 (BatchNorm), at most 16384."""
    return min(16384, max(count // 32, 8), count)


def probe_scores(
    train: Mapping[str, Num[np.ndarray, "n *t d"]],
    labels: Int[np.ndarray, " n"],
    test: Mapping[str, Num[np.ndarray, "m *t d"]],
    test_labels: Int[np.ndarray, " m"],
    *,
    num_classes: int,
    attention_heads: int = 0,
    recipe: ProbeRecipe = ProbeRecipe(),
) -> dict[str, Score]:
    """Train one head per name of the features, and return its score.

    All features must have the same shape, [n, d] or for attention pooling [n, patches, d]. The
    heads are trained together, on the same batches.
    """
    task = ProbeTask(
        Probe(num_classes, attention_heads=attention_heads), next(iter(train.values())).shape[1:]
    )
    features = [jnp.asarray(x) for x in train.values()]
    states = _train(task, recipe, features, jnp.asarray(labels))
    scores = {}
    for index, name in enumerate(train):
        params, stats = jax.tree.map(lambda x: x[index], (states.params, states.batch_stats))  # noqa: B023
        rankings = [
            np.asarray(_rank(task, params, stats, test[name][start : start + TEST_BATCH]))
            for start in range(0, len(test_labels), TEST_BATCH)
        ]
        scores[name] = accuracy(np.concatenate(rankings), test_labels)
    return scores


@partial(jax.jit, static_argnames="task")
def _rank(task: ProbeTask, params: Any, stats: Any, features: Array) -> Array:
    return top_k(task.logits(params, stats, features.astype(jnp.float32)))


@partial(jax.jit, static_argnames=("task", "recipe"))
def _train(
    task: ProbeTask, recipe: ProbeRecipe, features: list[Array], labels: Array
) -> TrainState:
    """Return the states of all heads after training, stacked along a first axis."""
    count, size = len(labels), batch_size_for(len(labels))
    steps_per_epoch = max(count // size, 1)
    total_steps = max(round(recipe.epochs * steps_per_epoch), 1)
    learning_rate = warmup_cosine(
        peak=recipe.learning_rate,
        warmup_steps=WARMUP_FRACTION * total_steps,
        total_steps=total_steps,
    )
    tx = lars(learning_rate, momentum=MOMENTUM, weight_decay=0.0)
    init_key, order_key, step_key = jax.random.split(jax.random.key(recipe.seed), 3)
    step = make_train_step(task, tx, learning_rate, step_key)
    state = init_state(task, tx, init_key)
    states = jax.tree.map(lambda x: jnp.stack([x] * len(features)), state)

    def train_step(carry: tuple[TrainState, Array], index: Array):
        states, order = carry
        epoch, position = index // steps_per_epoch, index % steps_per_epoch
        order = jax.lax.cond(
            position == 0,
            lambda: jax.random.permutation(jax.random.fold_in(order_key, epoch), count),
            lambda: order,
        )
        rows = jax.lax.dynamic_slice(order, (position * size,), (size,))
        pooled = jnp.stack([x[rows] for x in features]).astype(jnp.float32)
        batch = {"pooled": pooled, "label": labels[rows]}
        states, _ = jax.vmap(step, in_axes=(0, {"pooled": 0, "label": None}))(states, batch)
        return (states, order), None

    order = jnp.arange(count)
    (states, _), _ = jax.lax.scan(train_step, (states, order), jnp.arange(total_steps))
    return states
