"""The linear layer in bfloat16: float32 gradients, and matmuls in bfloat16 on CPUs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.layers import Dense, cast_kernels
from mae_jax.models.mixed_precision_dense import mixed_precision_dense

ROWS, IN, OUT = 300, 20, 28


@pytest.fixture(scope="module")
def arrays():
    """Return x, kernel, bias and an output gradient: float32 arrays of bfloat16 values."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (ROWS, IN), (IN, OUT), (OUT,), (ROWS, OUT)
    normal = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]
    return [array.astype(jnp.float32) for array in normal]


def gradients(arrays, parts=1):
    x, kernel, bias, gradient = arrays
    x, cast_kernel, gradient = (a.astype(jnp.bfloat16) for a in (x, kernel, gradient))
    dense = lambda *inputs: jnp.concatenate(mixed_precision_dense(*inputs, parts), axis=1)
    result, vjp = jax.vjp(dense, x, kernel, bias, cast_kernel)
    return result, vjp(gradient)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("width", [IN, IN - 1], ids=["even", "odd"])
def test_parameter_gradients_are_float32(arrays, width, parts):
    x, kernel, bias, gradient = arrays
    x, kernel = x[:, :width], kernel[:width]
    result, (dx, dkernel, dbias, dcast) = jax.jit(partial(gradients, parts=parts))(
        (x, kernel, bias, gradient)
    )
    assert result.dtype == dx.dtype == jnp.bfloat16
    assert dkernel.dtype == dbias.dtype == jnp.float32
    # The operands are exact; only the order of float32 sums differs.
    np.testing.assert_allclose(dkernel, x.T @ gradient, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dbias, gradient.sum(0), rtol=1e-5, atol=1e-4)
    assert not dcast.any()
    # Rounded once, to 8 bits.
    np.testing.assert_allclose(result.astype(jnp.float32), x @ kernel + bias, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(dx.astype(jnp.float32), gradient @ kernel.T, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize("parts", [1, 2])
def test_accelerators_sum_parameter_gradients_in_float32(arrays, parts, backend, monkeypatch):
    x, _, _, gradient = arrays
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    _, (_, dkernel, dbias, _) = gradients(arrays, parts)
    assert dkernel.dtype == dbias.dtype == jnp.float32
    np.testing.assert_allclose(dkernel, x.T @ gradient, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dbias, gradient.sum(0), rtol=1e-5, atol=1e-4)


def test_cpu_matmuls_are_bfloat16(arrays):
    """The forward matmul and both of the backward pass."""
    text = jax.jit(gradients).lower(arrays).compile().as_text()
    products = re.findall(r"f32\[[\d,]+\]\S* dot\((.*?)\)", text)
    assert len(products) == 3
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    for operands in products:
        assert {types[name] for name in re.findall(r"%[\w.-]+", operands)} == {"bf16"}, operands


def test_cast_kernels_do_not_change_the_result(arrays):
    x = arrays[0].reshape(3, -1, IN)
    dense = Dense(OUT, jnp.bfloat16)
    params = {"dense": dense.init(jax.random.key(0), x)["params"]}
    assert cast_kernels(params, jnp.float32) == {}
    cast = cast_kernels(params, jnp.bfloat16)
    assert jax.tree.map(lambda c: c.dtype, cast) == {
        "low_precision": {"dense": {"kernel": jnp.bfloat16}}
    }
    params, cast = params["dense"], cast["low_precision"]["dense"]
    expected = dense.apply({"params": params}, x)
    actual = dense.apply({"params": params, "low_precision": cast}, x)
    np.testing.assert_array_equal(actual, expected)
    twice = {"kernel": 2 * cast["kernel"]}  # shows that the cast kernel is used
    assert (dense.apply({"params": params, "low_precision": twice}, x) != expected).any()
