"""The tests of sharded activations (test_step_program.py) detect a model that does not pin them."""

import dataclasses

import jax
import pytest
from compiled_step import RECORDED, lower_step, measure, non_parameter_sizes


def test_activations_left_to_xla_are_gathered():
    step = lower_step(dataclasses.replace(RECORDED["bf16"], shard_activations=False))
    assert non_parameter_sizes(step)
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.shapes.params))
    assert measure(step)["all_gather_bytes"] > 1.05 * params


def test_fsdp_that_leaves_the_state_replicated_is_refused():
    with pytest.raises(Exception, match="mesh.fsdp=4 leaves 100 %"):
        lower_step(dataclasses.replace(RECORDED["bf16"], min_split_bytes=2**30))
