"""Reference checkpoints, comparisons and helpers of the tests of mae_jax.convert."""

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from mae_jax.convert.model_info import ModelInfo
from mae_jax.convert.networks import expected_shapes
from mae_jax.convert.weights import Weights
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD

HEADS = dict(heads=2, decoder_heads=2)  # which the official file lacks
OFFICIAL = "checkpoints/full_state_dict.safetensors"


def nhwc(images):
    return jnp.moveaxis(jnp.asarray(images), -3, -1)


def random_weights(**info):
    """Return weights of a very small model with random arrays; `info` as in `ModelInfo`."""
    sizes = dict(
        width=16, depth=2, heads=2, mlp_ratio=2.0, patch=8, channels=3, layer_norm_eps=1e-6
    )
    stats = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    info = ModelInfo(**(sizes | stats | dict(source="mae_jax", image_size=(32, 32)) | info))
    rng = np.random.default_rng(0)
    shapes = expected_shapes(info)
    arrays = {name: rng.uniform(0.1, 0.5, shape) for name, shape in shapes.items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Weights(arrays, info)


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
