"""The train step and the loop around it. Everything that observes the loop is handed in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, Key, PyTree

Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


class Task(Protocol):
    """A model together with its objective."""

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Fresh parameters."""
        ...

    def draw(self, key: Key[Array, ""], batch: Batch) -> Batch:
        """The batch with all that is random about its loss, for all of its rows at once."""
        ...

    def init_stats(self) -> PyTree:
        """Running statistics before the first batch; empty where there are none."""
        ...

    def loss(self, params: PyTree, stats: PyTree, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
        """The mean loss of the rows of a batch from `draw`, and the statistics after it."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: counts finished steps; ema: an average of the parameters, None where not asked for;
    batch_stats: running statistics of the model, empty where it has none.
    """

    step: Int[Array, ""]
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
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema, task.init_stats())


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    key: Key[Array, ""],
    *,
    prepare: Callable[[Batch], Batch] = lambda batch: batch,
    accumulate: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step on one batch, to be jitted.

    What is drawn is a function of (key, step, row of the global batch), so it does not depend on
    devices, on accumulation or on interruptions. `prepare` makes of a batch, as the loader gives
    it, one as the task takes it. `accumulate` computes the same mean gradient in
    that many smaller parts.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = task.draw(jax.random.fold_in(key, state.step), prepare(batch))
        loss, stats, grads = _loss_and_grads(task.loss, state, batch, accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            # In this form an average of what does not change does not change either, to the bit.
            rate = 1 - ema_decay
            ema = jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(learning_rate(state.step)),
        }
        return TrainState(state.step + 1, params, opt_state, ema, stats), metrics

    return train_step


def _loss_and_grads(
    loss: Callable[[PyTree, PyTree, Batch], tuple[Float[Array, ""], PyTree]],
    state: TrainState,
    batch: Batch,
    parts: int,
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Mean loss, statistics and mean gradient of a batch, computed in `parts` equal slices.

    Running statistics see one slice after the other, as the reference's do.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, stats), grads = value_and_grad(state.params, state.batch_stats, batch)
        return value, stats, grads
    # Slice i takes rows i, i + parts, ...: so every device keeps the rows that it has.
    slices = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=parts), batch)

    def add(carry, part):
        total, stats = carry
        (value, stats), grads = value_and_grad(state.params, stats, part)
        return (jax.tree.map(jnp.add, total, (value, grads)), stats), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.params))
    (total, stats), _ = jax.lax.scan(add, (zeros, state.batch_stats), slices)
    value, grads = jax.tree.map(lambda x: x / parts, total)
    return value, stats, grads


@dataclass(frozen=True)
class Hook:
    """Calls `run(step, state)` after every `every` steps."""

    every: int
    run: Callable[[int, TrainState], object]


class Observer(Protocol):
    """Is told of every step, one step late, so that the device never waits for the host."""

    def waiting(self) -> Any:
        """A context in which the loop waits for data."""
        ...

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step number `step` (from 1) is done and had these metrics."""
        ...

    def paused(self) -> Any:
        """A context in which the loop does other things than training."""
        ...


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    *,
    total_steps: int,
    hooks: Sequence[Hook],
    observer: Observer,
    check: Callable[[int, Mapping[str, float]], None],
    should_stop: Callable[[], bool],
) -> TrainState:
    """Trains until `total_steps` or until asked to stop.

    `check` raises where a step's metrics forbid to go on; hooks see only states that passed it.
    """
    start = int(state.step)
    late: list[tuple[int, Metrics]] = []

    def observe() -> None:
        for step, metrics in late:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check(step, values)
            observer.step_done(step, values)
        late.clear()

    for step in range(start + 1, total_steps + 1):
        with observer.waiting():
            batch = next(batches)
        state, metrics = train_step(state, batch)
        observe()
        late.append((step, metrics))
        stopping = should_stop()
        due = [hook for hook in hooks if step % hook.every == 0]
        if due:
            observe()
            with observer.paused():
                for hook in due:
                    hook.run(step, state)
        if stopping:
            break
    observe()
    return state
