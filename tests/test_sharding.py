import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mae_jax.distributed import sharding


def spec_of(state, fsdp):
    mesh = sharding.make_mesh(fsdp)
    return jax.tree.map(lambda s: s.spec, sharding.state_shardings(state, mesh))


def test_large_arrays_are_split_along_their_largest_axis_but_never_along_depth():
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)
    state = {
        "blocks": {"kernel": shape(1024, 256, 512), "deep": shape(2**20, 3, 3)},
        "head": shape(1024, 512),
        "odd": shape(1023, 513),
        "bias": shape(1024),
    }
    assert spec_of(state, 4) == {
        "blocks": {"kernel": P(None, None, "fsdp"), "deep": P(None, None, None)},
        "head": P("fsdp", None),
        "odd": P(None, None),
        "bias": P(None),
    }
    assert spec_of({"head": shape(1024, 512)}, 1) == {"head": P(None, None)}


def test_what_stays_whole_is_told_and_limited():
    mesh = sharding.make_mesh(4)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, np.float32)
    state = {"kernel": shape(1024, 512), "odd": shape(1023, 513)}
    shardings = sharding.state_shardings(state, mesh)
    assert sharding.bytes_per_device(state, shardings) == (1024 * 512, 1023 * 513 * 4)
    sharding.check_split(state, shardings, mesh, 0.6)
    with pytest.raises(ValueError, match=r"mesh.fsdp=4 leaves 50 % .* \(2.1 of 4.2 MB\)"):
        sharding.check_split(state, shardings, mesh, 0.1)
    mesh = sharding.make_mesh(1)
    sharding.check_split(state, sharding.state_shardings(state, mesh), mesh, 0.0)


def test_batch_is_split_over_both_axes():
    mesh = sharding.make_mesh(2)
    batch = sharding.shard_batch({"image": np.arange(8)}, mesh)
    assert [int(s.data[0]) for s in batch["image"].addressable_shards] == [0, 2, 4, 6]


def test_bad_meshes_and_batches():
    with pytest.raises(ValueError, match="mesh.fsdp=3 does not divide the 4 devices: use 1, 2, 4"):
        sharding.make_mesh(3)
    mesh = sharding.make_mesh()
    sharding.check_batch(16, 2, mesh)
    with pytest.raises(ValueError, match="accumulate=2 x 4 devices. Use 96 or 104"):
        sharding.check_batch(100, 2, mesh)
    with pytest.raises(ValueError, match="Use 4"):
        sharding.check_batch(2, 1, mesh)
    with pytest.raises(ValueError, match="accumulate=0"):
        sharding.check_batch(16, 0, mesh)
