"""The train step, on the pretraining objective, and the training loop around it."""

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

TINY = VitVariant(16, 2, 2, 8, decoder_width=16, decoder_depth=1, decoder_heads=2)
TASK = Pretrain(
    model=make_mae(TINY, grid=(4, 4)),
    grid=(4, 4),
    patch=8,
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    norm_pix=False,
)
LEARNING_RATE = warmup_cosine(peak=1e-2, warmup_steps=2, total_steps=20)
TX = adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
KEY = jax.random.key(5)
EMA_DECAY = 0.9


def batch_of(step, rows=8):
    return {"image": np.random.default_rng(step).uniform(100, 255, (rows, 32, 32, 3)).astype("f4")}


def make_step(**kwargs):
    """Return a jitted step that takes (key, state, batch)."""
    scale = lambda batch: {"image": batch["image"] / 255}
    kwargs |= dict(preprocess=scale, ema_decay=EMA_DECAY)
    return jax.jit(
        lambda key, *args: make_train_step(TASK, TX, LEARNING_RATE, key, **kwargs)(*args)
    )


@pytest.fixture(scope="module")
def start():
    return jax.jit(lambda key: init_state(TASK, TX, key, with_ema=True))(KEY)


@pytest.fixture(scope="module")
def step():
    return make_step()


@pytest.fixture(scope="module")
def accumulating_step():
    return make_step(grad_accum_steps=4)


@pytest.fixture(scope="module")
def run(start, step):
    """States and losses of six steps."""
    states, losses = [start], []
    for number in range(6):
        state, metrics = step(KEY, states[-1], batch_of(number))
        states.append(state)
        losses.append(float(metrics["loss"]))
    return states, losses


def test_loss_decreases(run):
    states, losses = run
    assert int(states[-1].step) == int(states[-1].position) == 6
    assert losses[-1] < losses[0]


def test_gradient_accumulation_gives_the_gradient_of_the_full_batch(run, accumulating_step):
    states, losses = run
    for number in range(2):
        state, metrics = accumulating_step(KEY, states[number], batch_of(number))
        np.testing.assert_allclose(metrics["loss"], losses[number], rtol=1e-5)
        # The first moment is linear in the gradients; Adam's division would amplify rounding.
        moments = (s.opt_state[0].mu for s in (state, states[number + 1]))
        for actual, expected in zip(*map(jax.tree.leaves, moments)):
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_masks_depend_on_the_key(run, step):
    states, losses = run
    _, metrics = step(jax.random.key(6), states[0], batch_of(0))
    assert abs(float(metrics["loss"]) - losses[0]) > 1e-6


def test_ema_of_the_parameters(run):
    states, _ = run
    expected = states[0].params
    for state in states[1:]:
        average = lambda e, p: EMA_DECAY * e + (1 - EMA_DECAY) * p
        expected = jax.tree.map(average, expected, state.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)


def test_the_form_for_gpus_computes_the_same_step(run, step, monkeypatch):
    state = run[0][1]
    after, expected = step(KEY, state, batch_of(1))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    actual_after, actual = make_step()(KEY, state, batch_of(1))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), actual_after.params, after.params
    )


def test_clipping_of_the_gradient_norm():
    tx = adamw(lambda _: 1.0, b1=0.0, b2=0.0, eps=1e9, weight_decay=0.0, clip_norm=1.0)
    params = {"w": jnp.zeros((2, 2))}
    updates, _ = tx.update({"w": jnp.full((2, 2), 50.0)}, tx.init(params), params)
    # With such a large eps the update is the clipped gradient over eps.
    np.testing.assert_allclose(optax.tree.norm(updates), 1e-9, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("accumulation", [False, True])
def test_a_step_with_nan_or_inf_is_skipped(run, step, accumulating_step, value, accumulation):
    first = run[0][1]
    bad = batch_of(1)
    bad["image"][3] = value
    step = accumulating_step if accumulation else step
    second, metrics = step(KEY, first, bad)
    assert metrics["skipped"] == 1
    assert [int(x) for x in (second.step, second.position, second.skipped)] == [2, 2, 1]
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, vars(second)[name], vars(first)[name])
    # The optimizer has taken one step, so its learning rate is that of the second.
    third, metrics = step(KEY, second, batch_of(2))
    assert metrics["skipped"] == 0
    np.testing.assert_allclose(metrics["learning_rate"], LEARNING_RATE(1))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, third.params, second.params))) > 0


class LargeGradients:
    """An objective with finite gradients whose norm overflows."""

    def init(self, key):
        return {"w": jnp.zeros((2, 2))}

    def init_stats(self):
        return {}

    def sample(self, key, batch):
        return batch

    def loss(self, params, stats, batch):
        return jnp.sum(1e30 * params["w"]), stats


def test_gradients_with_an_infinite_norm_are_skipped_and_not_clipped_to_zero():
    tx = adamw(lambda _: 0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    task = LargeGradients()
    state = init_state(task, tx, KEY)
    after, metrics = jax.jit(make_train_step(task, tx, lambda _: 0.1, KEY))(state, {})
    assert (float(metrics["loss"]), float(metrics["skipped"])) == (0.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)


# The training loop


class Recorder:
    """A LoopObserver that records the steps."""

    def __init__(self):
        self.steps = []

    def waiting(self, step):
        return nullcontext()

    paused = computing = waiting

    def step_done(self, step, metrics):
        assert set(metrics) == {"loss", "grad_norm", "learning_rate", "skipped"}
        self.steps.append(step)


@pytest.fixture
def run_fit(start, step):
    """Return a function that trains; it returns the last state and the recorded steps."""

    def run(total, hooks=(), stop_at=None, check=lambda step, metrics: True, start=start):
        recorder = Recorder()
        state = fit(
            start,
            lambda state, batch: step(KEY, state, batch),
            (batch_of(number) for number in range(int(start.step), 100)),
            total_steps=total,
            hooks=hooks,
            observer=recorder,
            check=check,
            should_stop=lambda step: step == stop_at,
        )
        return state, recorder.steps

    return run


def test_fit_reports_every_step_and_runs_hooks_on_checked_states(run_fit):
    calls = []
    hook = Hook(2, lambda step, state: calls.append((step, int(state.step))))
    state, steps = run_fit(5, [hook])
    assert steps == [1, 2, 3, 4, 5]
    assert calls == [(2, 2), (4, 4)]
    assert int(state.step) == 5


def test_fit_stops_on_request_and_resumes_to_the_same_parameters(run_fit):
    straight, _ = run_fit(5)
    stopped, steps = run_fit(5, stop_at=3)
    assert int(stopped.step) == 3
    assert steps == [1, 2, 3]
    resumed, steps = run_fit(5, start=stopped)
    assert steps == [4, 5]
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)


def test_a_failed_check_ends_the_run_before_the_hooks(run_fit):
    hook = Hook(2, lambda step, state: pytest.fail("hook ran"))
    check = lambda step, metrics: step != 2
    state, steps = run_fit(9, [hook], check=check)
    assert steps == [1, 2]
    assert int(state.step) == 2
    # Without a hook the check comes a step later, while the devices compute.
    state, steps = run_fit(9, check=check)
    assert steps == [1, 2, 3]
