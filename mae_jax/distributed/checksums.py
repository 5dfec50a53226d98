"""Checksums of arrays that do not depend on their sharding.

The bits of each element (of 8 bytes: of each half) and its index are hashed to 32 bits. The hashes
are summed modulo 2^32, twice with different constants. A change of one element is always detected,
since the hash is bijective for a given index; other changes collide with probability 2^-64. Integer
sums do not depend on their order, so each device sums its own shards.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

FACTORS = (0x9E3779B1, 0x27D4EB2F)  # multiply the index, one for each sum
CHUNK = 2**22  # elements of a numpy array to hash at a time


def checksums(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksum of every jax or numpy array of a state, 16 hex digits, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(state))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    sums = {name: _sums(leaf) for name, leaf in named.items()}
    return {name: "".join(f"{int(number):08x}" for number in sums[name]) for name in named}


def _sums(leaf: Array | np.ndarray) -> Any:
    if not isinstance(leaf, jax.Array):
        return _sums_of_numpy(np.asarray(leaf))
    # One after the other: the collectives of several programs at once can deadlock on CPU devices.
    return jax.device_get(_sums_on_device(leaf))


@jax.jit  # for each array, since many have the same shape, which is compiled once
def _sums_on_device(array: Array) -> list[Array]:
    dtype = _uint_dtype(array)
    if array.dtype == jnp.bool_:
        array = array.astype(dtype)
    words = jax.lax.bitcast_convert_type(array, dtype).astype(jnp.uint32)
    # The index in the flattened array, axis by axis: flattening would gather a sharded array.
    index, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        offset = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += offset * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return [jnp.sum(_hash(words, index, factor), dtype=jnp.uint32) for factor in FACTORS]


def _sums_of_numpy(array: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(array).reshape(-1).view(_uint_dtype(array))
    total = np.zeros(len(FACTORS), np.uint32)
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK].astype(np.uint32)
        index = np.arange(start, start + len(chunk), dtype=np.uint64).astype(np.uint32)
        hashes = [_hash(chunk, index, factor) for factor in FACTORS]
        total += np.array([np.sum(x, dtype=np.uint32) for x in hashes])
    return total


def _uint_dtype(array: Array | np.ndarray) -> np.dtype:
    return np.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")


def _hash(words: Any, index: Any, factor: int) -> Any:
    """Mix bits with the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = words ^ (index * np.uint32(factor) + np.uint32(factor))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
