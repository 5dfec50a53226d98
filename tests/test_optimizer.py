"""Learning rate schedule, weight decay groups and LARS against the official code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from official_state_dict import official_names
from safetensors.numpy import load_file

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.optimizer import lars, warmup_cosine, weight_decay_mask
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


@pytest.mark.parametrize("case", [0, 1, 2])
def test_lars(case, golden):
    arrays = load_file(golden / "lars" / "lars.safetensors")
    config = json.loads((golden / "lars" / "lars.json").read_text())[case]
    get = lambda name: jnp.asarray(arrays[f"c{case}_{name}"])  # noqa: E731
    tx = lars(
        lambda _: config["lr"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
        trust_coefficient=config["trust_coefficient"],
    )
    params = {"w": get("w0"), "b": get("b0")}
    state = tx.init(params)
    for step in range(5):
        updates, state = tx.update({"w": get("gw")[step], "b": get("gb")[step]}, state, params)
        params = optax.apply_updates(params, updates)
        for name in params:
            np.testing.assert_allclose(params[name], get(name)[step], atol=1e-5, rtol=1e-5)


def test_lars_computes_a_trust_ratio_for_every_block_of_a_stack():
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32) for _ in range(2))
    w = w * jnp.array([1.0, 10.0, 0.0])[:, None, None]
    tx = lars(lambda _: 1.0, momentum=0.9, weight_decay=0.0)
    stacked = {"blocks": {"kernel": w}}
    actual, _ = tx.update({"blocks": {"kernel": g}}, tx.init(stacked), stacked)
    for block in range(3):
        single = {"kernel": w[block]}
        expected, _ = tx.update({"kernel": g[block]}, tx.init(single), single)
        kernel = actual["blocks"]["kernel"][block]
        np.testing.assert_allclose(kernel, expected["kernel"], rtol=1e-6)
