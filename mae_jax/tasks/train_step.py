"""The train step and the loop around it. Everything that observes the loop is handed in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, Key, PyTree

from mae_jax.utils.compilation import train_step_compiler_options

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Task(Protocol):
    """A model together with its objective."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Fresh parameters."""
        ...

    def sample(self, key: Key[Array, ""], batch: Batch) -> Batch:
        """The batch with all that is random about its loss, for all of its rows at once."""
        ...

    def init_stats(self) -> PyTree:
        """Running statistics before the first batch; empty where there are none."""
        ...

    def loss(self, params: PyTree, stats: PyTree, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        """The mean loss of the rows of a batch from `sample`, and the statistics after it."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: counts finished steps; position: the next batch of data, which is the step unless some
    were passed over; skipped: steps that changed nothing, since their numbers were not finite;
    ema: an average of the parameters, None where not asked for; batch_stats: running statistics of
    the model, empty where it has none.
    """

    step: Int[Array, ""]
    position: Int[Array, ""]
    skipped: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None
    batch_stats: PyTree


def init_state(
    task: Task, tx: optax.GradientTransformation, key: Key[Array, ""], *, with_ema: bool = False
) -> TrainState:
    """The state before the first step."""
    params = task.init(key)
    ema = jax.tree.map(jnp.copy, params) if with_ema else None
    step, position, skipped = jnp.zeros((3,), jnp.int32)
    stats = task.init_stats()
    return TrainState(step, position, skipped, params, tx.init(params), ema, stats)


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    key: Key[Array, ""],
    *,
    preprocess: Callable[[Batch], Batch] = lambda batch: batch,
    grad_accum_steps: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step on one batch, to be jitted.

    What is drawn is a function of (key, step, row of the global batch), so it does not depend on
    devices, on accumulation or on interruptions. `preprocess` makes of a batch, as the loader gives
    it, one as the task takes it. `grad_accum_steps` computes the same mean gradient in that many smaller
    parts. Where the loss or the gradients are not finite numbers, the parameters and all that
    belongs to them stay as they are.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = task.sample(jax.random.fold_in(key, state.step), preprocess(batch))
        loss, stats, grads = _loss_and_grads(task.loss, state, batch, grad_accum_steps)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def changed() -> tuple[PyTree, ...]:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None and ema_decay is not None:
                # In this form an average of what does not change does not either, to the bit.
                rate = 1 - ema_decay
                ema = jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
            return params, opt_state, ema, stats

        before = (state.params, state.opt_state, state.ema, state.batch_stats)
        after = _if_finite(finite, changed, before)
        skipped = 1 - finite.astype(jnp.int32)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The optimizer counts the steps that it takes.
            "learning_rate": jnp.asarray(learning_rate(state.step - state.skipped)),
            "skipped": skipped,
        }
        new = TrainState(state.step + 1, state.position + 1, state.skipped + skipped, *after)
        return new, metrics

    return train_step


def _if_finite(finite: Array, changed: Callable[[], PyTree], before: PyTree) -> PyTree:
    """What `changed` gives, or where something is not finite what was before."""
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        # Selecting costs a CPU a copy of the optimizer's state. To branch, a GPU would have to wait
        # for the host, which reads the condition; and processes might send in different orders.
        return jax.lax.cond(finite, changed, lambda: before)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed(), before)


def jit_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    shardings: TrainState | None = None,
) -> Any:
    """The step jitted: the new state lies as `shardings` say, in the memory of the one before."""
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=train_step_compiler_options(),
    )


def _loss_and_grads(
    loss: Callable[[PyTree, PyTree, Batch], tuple[Float[Array, ""], PyTree]],
    state: TrainState,
    batch: Batch,
    num_microbatches: int,
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Mean loss, statistics and mean gradient of a batch, computed in `parts` equal slices.

    Running statistics see one slice after the other, as the reference's do.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (value, stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        return value, stats, grads
    # Slice i takes rows i, i + num_microbatches, ...: so every device keeps the rows that it has.
    slices = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=num_microbatches), batch)

    def add(carry, part):
        total, stats = carry
        (value, stats), grads = value_and_grad(state.params, stats, part)
        return (jax.tree.map(jnp.add, total, (value, grads)), stats), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
    (total, stats), _ = jax.lax.scan(add, (zeros, state.batch_stats), slices)
    value, grads = jax.tree.map(lambda x: x / num_microbatches, total)
    return value, stats, grads
