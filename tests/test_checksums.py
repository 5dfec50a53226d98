import jax
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


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_devices_and_numpy_agree(fsdp):
    mesh = sharding.make_mesh(fsdp)
    shardings = sharding.state_shardings(STATE, mesh, min_bytes=1024)
    state = sharding.device_put_tree(STATE, shardings)
    assert state["stacked"].addressable_shards[0].data.size == STATE["stacked"].size // fsdp
    assert checksums(state) == checksums(STATE)


def changed(array, change):
    array = array.copy()
    change(array.view(np.uint32).reshape(-1))
    return checksums({"stacked": array})


@pytest.mark.parametrize("bit", range(32))
def test_every_flipped_bit_shows(bit):
    def flip(words):
        words[1234] ^= np.uint32(1 << bit)

    assert changed(STATE["stacked"], flip) != checksums({"stacked": STATE["stacked"]})


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_flipped_bit_of_eight_bytes_shows(bit):
    """Which have no jax array here, but a file of another framework may hold them."""
    numbers = RNG.normal(size=100)
    flipped = numbers.copy()
    flipped.view(np.uint64)[42] ^= np.uint64(1 << bit)
    assert checksums({"x": flipped}) != checksums({"x": numbers})


def test_what_keeps_the_sum_of_the_bits_shows_too():
    before = checksums({"stacked": STATE["stacked"]})

    def swap(words):
        words[[10, 20]] = words[[20, 10]]

    def flip_two_signs(words):
        words[[10, 20]] ^= np.uint32(1 << 31)

    def clear(words):
        words[100:200] = 0

    found = [changed(STATE["stacked"], change) for change in (swap, flip_two_signs, clear)]
    assert before not in found
    assert len({str(digest) for digest in found}) == 3


def test_large_arrays_are_taken_in_parts(monkeypatch):
    whole = checksums(STATE)
    monkeypatch.setattr("mae_jax.distributed.checksums.CHUNK", 1000)
    assert checksums(STATE) == whole
    assert checksums(jax.device_put(STATE)) == whole
