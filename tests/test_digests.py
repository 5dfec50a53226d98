import jax
import ml_dtypes
import numpy as np
import pytest

from mae_jax import sharding
from mae_jax.digests import digests

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
    state = sharding.put(STATE, shardings)
    assert state["stacked"].addressable_shards[0].data.size == STATE["stacked"].size // fsdp
    assert digests(state) == digests(STATE)


def changed(array, change):
    array = array.copy()
    change(array.view(np.uint32).reshape(-1))
    return digests({"stacked": array})


@pytest.mark.parametrize("bit", range(32))
def test_every_flipped_bit_shows(bit):
    def flip(words):
        words[1234] ^= np.uint32(1 << bit)

    assert changed(STATE["stacked"], flip) != digests({"stacked": STATE["stacked"]})


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_flipped_bit_of_eight_bytes_shows(bit):
    """Which have no jax array here, but a file of another framework may hold them."""
    numbers = RNG.normal(size=100)
    flipped = numbers.copy()
    flipped.view(np.uint64)[42] ^= np.uint64(1 << bit)
    assert digests({"x": flipped}) != digests({"x": numbers})


def test_what_keeps_the_sum_of_the_bits_shows_too():
    before = digests({"stacked": STATE["stacked"]})

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
    whole = digests(STATE)
    monkeypatch.setattr("mae_jax.digests.AT_ONCE", 1000)
    assert digests(STATE) == whole
    assert digests(jax.device_put(STATE)) == whole
