"""Reference checkpoints, comparisons and helpers of the tests of mae_jax.convert."""

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

HEADS = dict(heads=2, decoder_heads=2)  # which the official file lacks
OFFICIAL = "checkpoints/full_state_dict.safetensors"


def nhwc(images):
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def assert_same(arrays, expected):
    """Assert that arrays have the same names, dtypes and bits."""
    assert arrays.keys() == expected.keys()
    for name in expected:
        assert arrays[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


def assert_close(array, expected):
    np.testing.assert_allclose(array, expected, atol=2e-5, rtol=1e-5)
    assert np.abs(array - expected).max() <= 5e-5 * np.abs(expected).max()


def write_changed(golden, tmp_path, change):
    """Write the official file after a change of its tensors, and return its path."""
    tensors = load_file(golden / OFFICIAL)
    change(tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path)
    return path
