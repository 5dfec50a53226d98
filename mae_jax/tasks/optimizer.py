"""Learning rate schedule and optimizers of the paper's recipes."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import Tree, flatten, logical_ndim, map_with_path, unflatten


def warmup_cosine(
    *, peak: float, warmup_steps: float, total_steps: float, minimum: float = 0.0
) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then a half-cosine decay to `minimum`.

    Loshchilov & Hutter 2017. As in the reference: per step, not per epoch, and 0 at step 0.

    Raises:
      UserError: the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"the warm-up ({warmup_steps:g} steps) must be shorter than the run "
            f"({total_steps:g} steps)"
        )

    def learning_rate(step):
        warming = peak * step / max(warmup_steps, 1)
        left = (total_steps - step) / (total_steps - warmup_steps)
        # (1 + cos(pi * done)) / 2 as sin(pi / 2 * left)^2, which float32 resolves to the last step.
        cooling = minimum + (peak - minimum) * jnp.sin(jnp.pi / 2 * left) ** 2
        return jnp.where(step < warmup_steps, warming, cooling)

    return learning_rate


PROBE_PARAMS = ("head", "attention_pool", "upsample")


def weight_decay_mask(params: Tree, exclude: Collection[str] = ()) -> dict:
    """Return True where weight decay applies: all parameters but 1-D ones (biases and norms).

    As in the reference: pretraining decays the cls and mask tokens; fine-tuning excludes
    "cls_token" and "pos_embed".

    Args:
      exclude: parts of parameter paths without weight decay.
    """

    def decayed(name: str, leaf: Any) -> bool:
        return logical_ndim(name, leaf) > 1 and not set(exclude) & set(name.split("/"))

    return map_with_path(decayed, params)


def lr_multipliers(
    params: Tree, *, layer_decay: float = 1.0, train_last_blocks: int | None = None
) -> dict:
    """Return learning rate multipliers of all parameters; 0 means frozen.

    They are scalars, except for stacked blocks: vectors over depth that broadcast to the stack.

    Args:
      layer_decay: ratio between successive layers (Clark et al. 2020). As in the reference:
        embeddings are layer 0, block i (from 0) is layer i + 1, all after the blocks has factor 1.
      train_last_blocks: train this number of last blocks and the head only (partial fine-tuning,
        paper figure 9). None trains everything; 0 trains the head alone.
    """
    depth = len(jax.tree.leaves(params["encoder"]["blocks"])[0])
    first = 0 if train_last_blocks is None else depth + 1 - train_last_blocks
    layers = np.arange(depth + 2)
    factors = np.where(layers < first, 0.0, layer_decay ** (depth + 1.0 - layers))

    def scale(name: str, leaf: Any) -> Any:
        part, *rest = name.split("/")
        if part == "encoder" and rest[0] == "blocks":
            return factors[1:-1].reshape(-1, *[1] * (leaf.ndim - 1)).astype(np.float32)
        if part == "encoder" and rest[0] != "norm":
            return np.float32(factors[0])
        trained = train_last_blocks != 0 or part in PROBE_PARAMS
        return np.float32(factors[-1] if trained else 0.0)

    return map_with_path(scale, params)


def stop_frozen_gradients(params: Tree, train_last_blocks: int | None) -> Tree:
    """Stop the gradients of frozen parameters.

    That excludes them from the gradient norm and from clipping. A fully frozen encoder needs no
    backward pass; a partly frozen one does, as its blocks are one loop.
    """
    if train_last_blocks is None:
        return params
    scales = lr_multipliers(params, train_last_blocks=train_last_blocks)

    def stop(leaf: jax.Array, scale: Any) -> jax.Array:
        if np.all(scale):
            return leaf
        stopped = jax.lax.stop_gradient(leaf)
        return jnp.where(scale, leaf, stopped) if np.any(scale) else stopped

    return jax.tree.map(stop, params, scales)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    no_weight_decay: Collection[str] = (),
    clip_norm: float | None = None,
    layer_decay: float = 1.0,
    train_last_blocks: int | None = None,
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019), with optional clipping of the gradient norm first.

    See `weight_decay_mask` for `no_weight_decay` and `lr_multipliers` for the last two arguments.
    """
    mask = lambda params: weight_decay_mask(params, no_weight_decay)
    update = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    if clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
    return _with_lr_multipliers(update, layer_decay, train_last_blocks)


def lars(
    learning_rate: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    no_weight_decay: Collection[str] = (),
    trust_coefficient: float = 1e-3,
    train_last_blocks: int | None = None,
) -> optax.GradientTransformation:
    """Return LARS (You et al. 2017), for linear probing.

    As in the reference: weight decay and trust ratio for matrices only, then momentum without
    Nesterov, and the learning rate last, on the momentum (`optax.lars` has it before).
    """
    mask = lambda params: weight_decay_mask(params, no_weight_decay)
    update = optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.stateless(lambda updates, params: _trust_ratio(updates, params, trust_coefficient)),
        optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _with_lr_multipliers(update, 1.0, train_last_blocks)


def _trust_ratio(updates: Any, params: Any, coefficient: float) -> dict:
    """Scale updates of matrices by coefficient * |parameter| / |update|, for each layer."""

    def ratio(name: str, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        update, param = pair
        ndim = logical_ndim(name, update)
        if ndim <= 1:
            return update
        axes = tuple(range(update.ndim - ndim, update.ndim))  # not the axis of stacked blocks
        p, u = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (param, update))
        valid = (p > 0) & (u > 0)
        return update * jnp.where(valid, coefficient * p / jnp.where(valid, u, 1.0), 1.0)

    return map_with_path(ratio, jax.tree.map(lambda u, p: (u, p), updates, params))


def _with_lr_multipliers(
    tx: optax.GradientTransformation, layer_decay: float, train_last_blocks: int | None
) -> optax.GradientTransformation:
    """Apply `lr_multipliers` to an optimizer, without optimizer state for frozen arrays."""
    if layer_decay == 1.0 and train_last_blocks is None:
        return tx

    def scales(params: Tree) -> dict[str, Any]:
        return flatten(
            lr_multipliers(params, layer_decay=layer_decay, train_last_blocks=train_last_blocks)
        )

    def trained(tree: Tree, scales: dict[str, Any]) -> dict:
        return unflatten({n: leaf for n, leaf in flatten(tree).items() if scales[n].any()})

    def init(params: Any) -> optax.OptState:
        return tx.init(trained(params, scales(params)))

    def update(updates: Any, state: optax.OptState, params: Any = None):
        assert params is not None
        factors = scales(params)
        updates, state = tx.update(trained(updates, factors), state, trained(params, factors))
        trained_updates = flatten(updates)
        # Adding -0.0 keeps the bits of every x; adding 0.0 would turn -0.0 into 0.0.
        return map_with_path(
            lambda name, param: (
                jnp.where(factors[name], trained_updates[name] * factors[name], -0.0)
                if name in trained_updates
                else jnp.full_like(param, -0.0)
            ),
            params,
        ), state

    return optax.GradientTransformation(init, update)
