"""Budgets of the compiled train step: what keeps it fast, tested without timing anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_step import (
    RECORDED,
    Setup,
    jax_version,
    lower_step,
    measure,
    non_parameter_sizes,
    read_budgets,
    train_flops,
)

from benchmarks.hlo import products
from mae_jax.distributed import sharding
from mae_jax.models.variants import VitVariant

COMMAND = "python -m tests.compiled_step --record"


@pytest.fixture(scope="module")
def steps():
    """Compiled steps: "f32" with a replicated state, "bf16" with FSDP over 4 devices."""
    return {name: lower_step(setup) for name, setup in RECORDED.items()}


def params_bytes(step):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.shapes.params))


def test_flops_equal_the_analytic_count():
    wide = VitVariant(768, 2, 12, 16, decoder_depth=2)  # as ViT-B, so that products dominate
    by_xla, analytic = train_flops(Setup(size=wide, per_device_batch=4))
    assert by_xla == pytest.approx(analytic, rel=0.03)


@pytest.mark.parametrize("name", RECORDED)
def test_counts_are_within_budget(steps, name):
    if jax_version() not in read_budgets():
        pytest.skip(f"no budgets for jax {jax_version()}: {COMMAND}")
    budget, counts = read_budgets()[jax_version()][name], measure(steps[name])
    over = {key: (counts[key], limit) for key, limit in budget.items() if counts[key] > limit}
    assert not over, f"(now, budget); if intended: {COMMAND}"


def test_bfloat16_step_has_no_float32_product(steps):
    dtypes = {name: [types for types, _ in products(step.text)] for name, step in steps.items()}
    assert len(dtypes["f32"]) > 20
    assert all("f32" in types for types in dtypes["f32"])
    assert len(dtypes["bf16"]) > 20
    assert not any("f32" in types for types in dtypes["bf16"])


@pytest.mark.parametrize("name", RECORDED)
def test_activations_stay_sharded(steps, name):
    assert non_parameter_sizes(steps[name]) == set()


def test_replicated_state_only_all_reduces_gradients(steps):
    traffic = measure(steps["f32"])
    assert traffic["all_reduce_bytes"] == params_bytes(steps["f32"]) + 4  # and the loss
    assert traffic["all_gather_bytes"] == 0


def test_fsdp_gathers_weights_twice_and_in_bfloat16(steps):
    gathered = measure(steps["bf16"])["all_gather_bytes"]
    assert 0.8 < gathered / params_bytes(steps["bf16"]) < 1.05  # of float32 parameters


@pytest.mark.parametrize("name", RECORDED)
def test_state_is_donated(steps, name):
    step = steps[name]
    state = sum(sharding.bytes_per_device(step.shapes, step.shardings))
    assert step.compiled.memory_analysis().alias_size_in_bytes == state


def test_step_deletes_the_previous_state(steps):
    step = steps["f32"]
    zeros = lambda leaf, where: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where)
    state = jax.tree.map(zeros, step.shapes, step.shardings)
    images = np.zeros((96, 40, 40, 3), np.uint8)
    step.compiled(state, sharding.shard_batch({"image": images}, step.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
