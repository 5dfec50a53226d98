"""Meshes, sharding rules for train states and batches, and their errors."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mae_jax.distributed import sharding
from mae_jax.utils.errors import UserError


def array(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def specs(state, fsdp):
    mesh = sharding.make_mesh(fsdp)
    return jax.tree.map(lambda s: s.spec, sharding.state_shardings(state, mesh))


def test_large_arrays_are_sharded_along_the_largest_axis_but_never_along_depth():
    state = {
        "blocks": {"kernel": array(1024, 256, 512), "deep": array(2**20, 3, 3)},
        "head": array(1024, 512),
        "odd": array(1023, 513),
        "bias": array(1024),
    }
    assert specs(state, 4) == {
        "blocks": {"kernel": P(None, None, "fsdp"), "deep": P(None, None, None)},
        "head": P("fsdp", None),
        "odd": P(None, None),
        "bias": P(None),
    }
    assert specs({"head": array(1024, 512)}, 1) == {"head": P(None, None)}


def test_replicated_bytes_are_limited():
    mesh = sharding.make_mesh(4)
    state = {"kernel": array(1024, 512), "odd": array(1023, 513)}
    shardings = sharding.state_shardings(state, mesh)
    assert sharding.bytes_per_device(state, shardings) == (1024 * 512, 1023 * 513 * 4)
    sharding.check_sharded(state, shardings, mesh, 0.6)
    with pytest.raises(UserError, match=r"mesh.fsdp=4 leaves 50 % .* \(2.1 of 4.2 MB\)"):
        sharding.check_sharded(state, shardings, mesh, 0.1)
    mesh = sharding.make_mesh(1)
    sharding.check_sharded(state, sharding.state_shardings(state, mesh), mesh, 0.0)


def test_batches_are_sharded_over_both_axes():
    mesh = sharding.make_mesh(2)
    batch = sharding.shard_batch({"image": np.arange(8)}, mesh)
    assert [int(s.data[0]) for s in batch["image"].addressable_shards] == [0, 2, 4, 6]


def test_invalid_meshes_and_batch_sizes():
    with pytest.raises(UserError, match="mesh.fsdp=3 does not divide the 4 devices: use 1, 2, 4"):
        sharding.make_mesh(3)
    mesh = sharding.make_mesh()
    sharding.check_batch(16, 2, mesh)
    for batch_size, accumulate, message in (
        (100, 2, "batch_size=100 is not divisible by accumulate=2 x 4 devices: use 96 or 104"),
        (2, 1, "use 4"),
        (16, 0, "accumulate=0 must be at least 1"),
        (0, 1, "batch_size=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            sharding.check_batch(batch_size, accumulate, mesh)
