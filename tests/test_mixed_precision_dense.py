"""The linear layer in bfloat16: float32 gradients, and products that a CPU need not widen."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.layers import Dense, cast_kernels
from mae_jax.models.mixed_precision_dense import mixed_precision_dense

ROWS, IN, OUT = 300, 20, 28


@pytest.fixture(scope="module")
def arrays():
    """x, kernel, bias and a gradient; all are bfloat16 numbers, in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (ROWS, IN), (IN, OUT), (OUT,), (ROWS, OUT)
    drawn = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes)]
    return [array.astype(jnp.float32) for array in drawn]


def gradients(arrays):
    x, kernel, bias, gradient = arrays
    x, narrow, gradient = (a.astype(jnp.bfloat16) for a in (x, kernel, gradient))
    result, pull_back = jax.vjp(mixed_precision_dense, x, kernel, bias, narrow)
    return result, pull_back(gradient)


@pytest.mark.parametrize("width", [IN, IN - 1], ids=["even", "odd"])
def test_gradients_of_parameters_are_those_of_float32(arrays, width):
    x, kernel, bias, gradient = arrays
    x, kernel = x[:, :width], kernel[:width]
    result, (dx, dkernel, dbias, dnarrow) = jax.jit(gradients)((x, kernel, bias, gradient))
    assert result.dtype == dx.dtype == jnp.bfloat16
    assert dkernel.dtype == dbias.dtype == jnp.float32
    # The operands are exact, so what is left is the order of sums in float32.
    np.testing.assert_allclose(dkernel, x.T @ gradient, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dbias, gradient.sum(0), rtol=1e-5, atol=1e-4)
    assert not dnarrow.any()
    # Rounded once, to 8 bits.
    np.testing.assert_allclose(result.astype(jnp.float32), x @ kernel + bias, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(dx.astype(jnp.float32), gradient @ kernel.T, rtol=2**-8, atol=1e-4)


def test_on_a_cpu_no_operand_is_widened(arrays):
    """Neither of the product nor of the two of its backward pass."""
    text = jax.jit(gradients).lower(arrays).compile().as_text()
    products = re.findall(r"f32\[[\d,]+\]\S* dot\((.*?)\)", text)
    assert len(products) == 3
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    for operands in products:
        assert {types[name] for name in re.findall(r"%[\w.-]+", operands)} == {"bf16"}, operands


def test_copies_are_the_kernels_alone_and_change_nothing(arrays):
    x = arrays[0].reshape(3, -1, IN)
    dense = Dense(OUT, jnp.bfloat16)
    params = {"dense": dense.init(jax.random.key(0), x)["params"]}
    assert cast_kernels(params, jnp.float32) == {}
    copies = cast_kernels(params, jnp.bfloat16)
    assert jax.tree.map(lambda c: c.dtype, copies) == {
        "low_precision": {"dense": {"kernel": jnp.bfloat16}}
    }
    alone = dense.apply({"params": params["dense"]}, x)
    given = dense.apply(
        {"params": params["dense"], "low_precision": copies["low_precision"]["dense"]}, x
    )
    np.testing.assert_array_equal(alone, given)
    twice = {"kernel": 2 * copies["low_precision"]["dense"]["kernel"]}  # so they are what is used
    assert (dense.apply({"params": params["dense"], "low_precision": twice}, x) != alone).any()
