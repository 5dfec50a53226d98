"""Learning-rate schedule and optimizer of the paper's recipes."""

import jax.numpy as jnp
import optax

from mae_jax.trees import Tree, logical_ndim, map_named


def warmup_cosine(
    *, peak: float, warmup_steps: float, total_steps: float, minimum: float = 0.0
) -> optax.Schedule:
    """Linear warm-up, then half a cosine, as a function of the step (Loshchilov & Hutter 2017).

    As in the reference: set per step and not per epoch, and 0 at the very first step.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"the warm-up ({warmup_steps:g} steps) must be shorter than the whole run "
            f"({total_steps:g} steps): lower optim.warmup_epochs or optim.warmup_steps"
        )

    def learning_rate(step):
        warming = peak * step / max(warmup_steps, 1)
        left = (total_steps - step) / (total_steps - warmup_steps)
        # (1 + cos(pi * done)) / 2 is sin(pi / 2 * left)^2, which float32 holds to the last step.
        cooling = minimum + (peak - minimum) * jnp.sin(jnp.pi / 2 * left) ** 2
        return jnp.where(step < warmup_steps, warming, cooling)

    return learning_rate


def decay_mask(params: Tree) -> dict:
    """True where weight decay applies: everything but 1-D parameters (biases and norms).

    As in the reference: the cls and mask tokens are decayed in pretraining.
    """
    return map_named(lambda name, leaf: logical_ndim(name, leaf) > 1, params)


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after optional clipping of the global gradient norm."""
    update = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
    )
    if clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)
