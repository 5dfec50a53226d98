"""The train step: gradient accumulation, optimizer update, EMA and skipping of NaN/Inf steps."""

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
    """A model with its training objective."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Initialize the parameters."""
        ...

    def sample(self, key: Key[Array, ""], batch: Batch) -> Batch:
        """Add everything random about the loss to a global batch, for all rows at once."""
        ...

    def init_stats(self) -> PyTree:
        """Initialize the running statistics; empty if there are none."""
        ...

    def loss(self, params: PyTree, stats: PyTree, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        """Compute the mean loss of a batch from `sample`, and the updated statistics."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State of training.

    step: number of finished steps; position: index of the next batch, equal to the step unless a
    rollback skipped batches; skipped: steps without an update because of NaN/Inf; ema: exponential
    moving average of the parameters, or None; batch_stats: running statistics of BatchNorm, or {}.
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
    """Return the state before the first step."""
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
    """Return a function for one optimizer step on one batch; jit it with `jit_step`.

    Randomness is a function of (key, step, row of the global batch): it does not depend on devices,
    gradient accumulation or restarts. If the loss or the gradient norm is NaN/Inf, the update is
    skipped: parameters, optimizer state, EMA and statistics are unchanged.

    Args:
      learning_rate: of `tx`, to report it in the metrics.
      preprocess: applied to the batches of the loader, on the devices.
      grad_accum_steps: micro-batches in which to compute the gradient of a batch.
      ema_decay: of the moving average of the parameters.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("preprocess"):
            batch = preprocess(batch)
        with jax.named_scope("sample"):
            batch = task.sample(jax.random.fold_in(key, state.step), batch)
        loss, stats, grads = _loss_and_grads(task.loss, state, batch, grad_accum_steps)
        with jax.named_scope("guard"):
            grad_norm = _global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def update() -> tuple[PyTree, ...]:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None and ema_decay is not None:
                # In this form the average of constant parameters is constant, to the bit.
                rate = 1 - ema_decay
                ema = jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
            return params, opt_state, ema, stats

        before = (state.params, state.opt_state, state.ema, state.batch_stats)
        with jax.named_scope("optimizer"):
            after = _if_finite(finite, update, before)
        skipped = 1 - finite.astype(jnp.int32)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            # The optimizer does not count skipped steps.
            "learning_rate": jnp.asarray(learning_rate(state.step - state.skipped)),
            "skipped": skipped,
        }
        new = TrainState(state.step + 1, state.position + 1, state.skipped + skipped, *after)
        return new, metrics

    return train_step


def _global_norm(grads: PyTree) -> Float[Array, ""]:
    """Compute the L2 norm of all gradients."""
    if jax.default_backend() != "gpu":
        return optax.tree.norm(grads)
    # Sums over rows are computed in the kernels of the norms' gradients (`fold_norms`), which read
    # the same arrays. The barrier prevents that XLA sums over all axes at once.
    leaves = map(jnp.atleast_1d, jax.tree.leaves(grads))
    rows = [jnp.sum(jnp.square(each), axis=-1) for each in leaves]
    return jnp.sqrt(sum(map(jnp.sum, jax.lax.optimization_barrier(rows))))


def _if_finite(finite: Array, update: Callable[[], PyTree], before: PyTree) -> PyTree:
    """Return `update()` if finite, else `before` (as `optax.apply_if_finite`, for all state)."""
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        # On a CPU, selecting copies the optimizer state. A GPU would synchronize with the host to
        # branch, and the collectives of processes might run in different orders.
        return jax.lax.cond(finite, update, lambda: before)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(), before)


def jit_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    shardings: TrainState | None = None,
) -> Any:
    """Jit a train step that donates its state; the new state has the given shardings."""
    devices = jax.tree.leaves(shardings)[0].device_set if shardings else jax.devices()
    device_kind = next(iter(devices)).device_kind
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=train_step_compiler_options(device_kind),
    )


def _loss_and_grads(
    loss: Callable[[PyTree, PyTree, Batch], tuple[Float[Array, ""], PyTree]],
    state: TrainState,
    batch: Batch,
    num_microbatches: int,
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Compute mean loss, statistics and mean gradient of a batch, with gradient accumulation.

    As in the reference, running statistics are updated with every micro-batch.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if num_microbatches == 1:
        (value, stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        return value, stats, grads
    # Strided, not contiguous, micro-batches: so every device keeps its own rows.
    microbatches = jax.tree.map(
        lambda x: rearrange(x, "(b a) ... -> a b ...", a=num_microbatches), batch
    )

    def add(carry, microbatch):
        total, stats = carry
        (value, stats), grads = value_and_grad(state.params, stats, microbatch)
        return (jax.tree.map(jnp.add, total, (value, grads)), stats), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
    (total, stats), _ = jax.lax.scan(add, (zeros, state.batch_stats), microbatches)
    value, grads = jax.tree.map(lambda x: x / num_microbatches, total)
    return value, stats, grads
