"""Learning rate schedule and weight decay groups against the official code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official_state_dict import official_names

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.optimizer import warmup_cosine, weight_decay_mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten


def test_schedule_is_the_references(golden):
    """float64 to 1e-12, and float32, as in training, to 1e-6 of the peak."""
    for case in json.loads((golden / "lr_sched" / "lr_sched.json").read_text()):
        schedule = warmup_cosine(
            peak=case["lr"],
            minimum=case["min_lr"],
            warmup_steps=case["warmup_epochs"],
            total_steps=case["epochs"],
        )
        epochs, expected = np.array(case["table"])[:, :2].T
        with jax.enable_x64(True):
            exact = jax.vmap(schedule)(epochs)
        # The last rate is 1e-11 of the peak: there the reference's 1 + cos is rounded.
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-16 * case["lr"])
        single = jax.vmap(schedule)(jnp.asarray(epochs, jnp.float32))
        np.testing.assert_allclose(single, expected, atol=1e-6 * case["lr"])


def test_schedule_is_exact_in_float32_to_the_last_of_a_million_steps():
    steps = np.array([1_000_000 - 1, 1_000_000 - 10, 500_000], np.int32)
    kwargs = dict(peak=1.0, warmup_steps=1000, total_steps=1_000_000)
    with jax.enable_x64(True):
        exact = jax.vmap(warmup_cosine(**kwargs))(steps.astype(np.float64))
    np.testing.assert_allclose(jax.vmap(warmup_cosine(**kwargs))(steps), exact, rtol=1e-6)


def test_first_learning_rate_is_zero_or_without_warmup_the_peak():
    assert warmup_cosine(peak=1.0, warmup_steps=5, total_steps=10)(0) == 0
    assert warmup_cosine(peak=1.0, warmup_steps=0, total_steps=10)(0) == 1


def test_warmup_must_be_shorter_than_the_run():
    with pytest.raises(UserError, match="must be shorter"):
        warmup_cosine(peak=1.0, warmup_steps=10, total_steps=10)


def test_weight_decay_groups_are_the_references(golden):
    reference = json.loads((golden / "lr_decay" / "pretrain_groups_vit_base.json").read_text())
    decayed = {name: decay > 0 for name, decay in reference["weight_decay"].items()}
    task = Pretrain(
        model=make_mae(VARIANTS["vit_b16"], grid=(14, 14)),
        grid=(14, 14),
        patch=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    mask = flatten(weight_decay_mask(jax.eval_shape(task.init, jax.random.key(0))))
    official = official_names(decayed)
    assert set(mask) == set(official)
    for path, names in official.items():
        assert {decayed[n] for n in names} == {mask[path]}, path
