"""Checksums do not depend on the sharding, and detect changes."""

import ml_dtypes
import numpy as np
import pytest

from mae_jax.distributed import sharding
from mae_jax.distributed.checksums import checksums

RNG = np.random.default_rng(0)
STATE = {
    "stacked": RNG.normal(size=(3, 64, 128)).astype(np.float32),
    "half": RNG.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
    "numbers": np.arange(5, dtype=np.int32),
    "one": np.float32(3),
    "switches": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("fsdp", [1, 4])
def test_jax_and_numpy_have_equal_checksums(fsdp):
    mesh = sharding.make_mesh(fsdp)
    shardings = sharding.state_shardings(STATE, mesh, min_bytes=1024)
    state = sharding.device_put_tree(STATE, shardings)
    assert state["stacked"].addressable_shards[0].data.size == STATE["stacked"].size // fsdp
    assert checksums(state) == checksums(STATE)


def checksum(array):
    (text,) = checksums({"x": array}).values()
    return text


def test_every_flipped_bit_is_detected():
    float32, float64 = STATE["stacked"], RNG.normal(size=100)  # float64 from other frameworks
    for array, dtype in ((float32, np.uint32), (float64, np.uint64)):
        for bit in range(8 * array.itemsize):
            flipped = array.copy()
            flipped.view(dtype).reshape(-1)[42] ^= dtype(1 << bit)
            assert checksum(flipped) != checksum(array), bit


def test_changes_that_preserve_the_sum_are_detected():
    def swap(words):
        words[[10, 20]] = words[[20, 10]]

    def flip_two_signs(words):
        words[[10, 20]] ^= np.uint32(1 << 31)

    def clear(words):
        words[100:200] = 0

    results = {checksum(STATE["stacked"])}
    for change in (swap, flip_two_signs, clear):
        array = STATE["stacked"].copy()
        change(array.view(np.uint32).reshape(-1))
        results.add(checksum(array))
    assert len(results) == 4


def test_large_arrays_are_hashed_in_chunks(monkeypatch):
    expected = checksums(STATE)
    monkeypatch.setattr("mae_jax.distributed.checksums.CHUNK", 1000)
    assert checksums(STATE) == expected
