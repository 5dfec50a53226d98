"""The train step and the loop, on the real task."""

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import init_state, make_train_step
from mae_jax.train.loop import Hook, fit

TINY = VitVariant(32, 2, 2, 8, decoder_width=16, decoder_depth=1, decoder_heads=2)
LEARNING_RATE = warmup_cosine(peak=1e-2, warmup_steps=2, total_steps=20)
TX = adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
KEY = jax.random.key(5)


def make_task(mask="random"):
    model = make_mae(TINY, grid=(4, 4))
    return Pretrain(model=model, grid=(4, 4), patch=8, mean=(0.5,) * 3, std=(0.25,) * 3, mask=mask)


def batch_of(step, rows=8):
    images = np.random.default_rng(step).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    return {"image": images}


def train(steps, *, mask="random", **kwargs):
    """Losses and final state of a few steps."""
    task = make_task(mask)
    state = jax.jit(lambda key: init_state(task, TX, key, with_ema="ema_decay" in kwargs))(KEY)
    step = jax.jit(make_train_step(task, TX, LEARNING_RATE, KEY, **kwargs))
    losses = []
    for number in range(steps):
        state, metrics = step(state, batch_of(number))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def plain():
    return train(6)


def test_learns_and_counts(plain):
    losses, state = plain
    assert int(state.step) == 6
    assert losses[-1] < losses[0]


def test_accumulation_equals_the_big_batch():
    losses, state = train(4, mask="block")
    parts_losses, parts_state = train(4, mask="block", grad_accum_steps=4)
    np.testing.assert_allclose(parts_losses, losses, rtol=1e-5)
    # The first moment is linear in the gradients; Adam's division would amplify rounding.
    for a, b in zip(*(jax.tree.leaves(s.opt_state[0].mu) for s in (state, parts_state))):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_step_key_decides_the_masks(plain):
    task = make_task()
    state = jax.jit(lambda key: init_state(task, TX, key))(KEY)
    other = jax.jit(make_train_step(task, TX, LEARNING_RATE, jax.random.key(6)))
    assert abs(float(other(state, batch_of(0))[1]["loss"]) - plain[0][0]) > 1e-6


def test_ema_follows_the_parameters():
    _, state = train(3, ema_decay=0.9)
    task = make_task()
    expected = jax.tree.map(np.asarray, jax.jit(task.init)(KEY))
    step = jax.jit(make_train_step(task, TX, LEARNING_RATE, KEY))
    other = jax.jit(lambda key: init_state(task, TX, key))(KEY)
    for number in range(3):
        other, _ = step(other, batch_of(number))
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, other.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)


def test_clipping_bounds_the_gradient():
    tx = adamw(lambda _: 1.0, b1=0.0, b2=0.0, eps=1e9, weight_decay=0.0, clip_norm=1.0)
    params = {"w": jnp.zeros((2, 2))}
    updates, _ = tx.update({"w": jnp.full((2, 2), 50.0)}, tx.init(params), params)
    # With so large an eps the update is the clipped gradient over eps.
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-9, rtol=1e-3)


class Recorder:
    """An observer that remembers."""

    def __init__(self):
        self.steps = []

    def waiting(self, step):
        return nullcontext()

    paused = computing = waiting

    def step_done(self, step, metrics):
        assert set(metrics) == {"loss", "grad_norm", "learning_rate", "skipped"}
        self.steps.append(step)


def run_fit(total, hooks=(), stop_at=None, check=lambda step, metrics: True, start=None):
    task, recorder = make_task(), Recorder()
    state = start or jax.jit(lambda key: init_state(task, TX, key))(KEY)
    step = jax.jit(make_train_step(task, TX, LEARNING_RATE, KEY))
    state = fit(
        state,
        step,
        (batch_of(number) for number in range(int(state.step), 100)),
        total_steps=total,
        hooks=hooks,
        observer=recorder,
        check=check,
        should_stop=lambda step: step == stop_at,
    )
    return state, recorder.steps


def test_fit_observes_every_step_and_runs_hooks_on_observed_states():
    seen = []
    hook = Hook(2, lambda step, state: seen.append((step, int(state.step))))
    state, steps = run_fit(5, [hook])
    assert steps == [1, 2, 3, 4, 5]
    assert seen == [(2, 2), (4, 4)]
    assert int(state.step) == 5


def test_fit_stops_when_asked_and_continues_to_the_same_parameters():
    straight, _ = run_fit(5)
    stopped, steps = run_fit(5, stop_at=3)
    assert int(stopped.step) == 3
    assert steps == [1, 2, 3]
    continued, steps = run_fit(5, start=stopped)
    assert steps == [4, 5]
    jax.tree.map(np.testing.assert_array_equal, continued.params, straight.params)


def test_a_failed_check_ends_the_run_before_any_hook_sees_the_state():
    hook = Hook(2, lambda step, state: pytest.fail("hook ran"))
    state, steps = run_fit(9, [hook], check=lambda step, metrics: step != 2)
    assert steps == [1, 2]
    assert int(state.step) == 2
    # Without a hook the check comes a step late, while the devices compute.
    state, steps = run_fit(9, check=lambda step, metrics: step != 2)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "grad_accum_steps"), [(np.nan, 1), (np.inf, 1), (1e30, 2)], ids=str
)
def test_a_step_with_numbers_that_are_none_changes_nothing(value, grad_accum_steps):
    task = dataclasses.replace(make_task(), norm_pix=False)
    state = jax.jit(lambda key: init_state(task, TX, key, with_ema=True))(KEY)
    step = jax.jit(make_train_step(task, TX, LEARNING_RATE, KEY, grad_accum_steps=grad_accum_steps))
    good = {"image": np.float32(batch_of(0)["image"])}
    bad = {"image": good["image"].copy()}
    bad["image"][3] = value
    first, metrics = step(state, good)
    assert metrics["skipped"] == 0
    second, metrics = step(first, bad)
    assert metrics["skipped"] == 1
    assert [int(x) for x in (second.step, second.position, second.skipped)] == [2, 2, 1]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, vars(second)[name], vars(first)[name])
    # The optimizer has taken one step, so its learning rate is that of the second.
    third, metrics = step(second, good)
    np.testing.assert_allclose(metrics["learning_rate"], LEARNING_RATE(1))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, third.params, second.params))) > 0


class Steep:
    """A task whose gradients are finite, but so large that their norm is not."""

    def init(self, key):
        return {"w": jnp.zeros((2, 2))}

    def init_stats(self):
        return {}

    def sample(self, key, batch):
        return batch

    def loss(self, params, stats, batch):
        return jnp.sum(1e30 * params["w"]), stats


def test_gradients_without_a_norm_are_skipped_and_not_clipped_to_nothing():
    tx = adamw(lambda _: 0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    state = init_state(Steep(), tx, KEY)
    after, metrics = jax.jit(make_train_step(Steep(), tx, lambda _: 0.1, KEY))(state, {})
    assert (float(metrics["loss"]), float(metrics["skipped"])) == (0.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
