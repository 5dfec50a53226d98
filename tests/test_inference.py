"""Inference on CPUs: batches are computed in chunks, by as many threads as there are cores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.distributed import sharding
from mae_jax.distributed.inference import CHUNK_ROWS, SLICE_ROWS, with_sharded_inputs


@pytest.mark.parametrize(
    ("rows", "chunk_rows"),
    [(1, 1), (SLICE_ROWS, CHUNK_ROWS), (3 * SLICE_ROWS, CHUNK_ROWS), (SLICE_ROWS + 1,) * 2],
)
def test_chunks_are_of_one_size_and_joined_in_order(rows, chunk_rows):
    shapes = []

    @jax.jit
    def function(state, images):
        shapes.append(images.shape)  # once per compiled program
        return {"sum": state + images.sum(axis=(1, 2, 3)), "images": images}

    mesh = sharding.make_mesh(1, devices=jax.devices()[:1])
    images = np.arange(rows * 12, dtype=np.float32).reshape(rows, 2, 2, 3)
    outputs = with_sharded_inputs(function, mesh, jnp.ones(()))(images)
    np.testing.assert_array_equal(outputs["images"], images)
    np.testing.assert_array_equal(outputs["sum"], 1 + images.sum(axis=(1, 2, 3)))
    assert shapes == [(chunk_rows, 2, 2, 3)]
