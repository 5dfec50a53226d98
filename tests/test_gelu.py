"""The GELU: its values, and its gradients on GPUs and TPUs, by a saved derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.gelu import gelu


def value_and_gradient(dtype):
    x = jnp.linspace(-6.0, 6.0, 240, dtype=dtype).reshape(2, 5, 24)
    value, vjp = jax.vjp(gelu, x)
    return np.asarray(value, np.float32), np.asarray(*vjp(jnp.ones_like(x)), np.float32)


def test_values_are_those_of_the_exact_gelu():
    x = np.linspace(-6.0, 6.0, 240, dtype=np.float32).reshape(2, 5, 24)
    np.testing.assert_allclose(
        value_and_gradient(jnp.float32)[0],
        jax.nn.gelu(x, approximate=False),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_accelerators_save_the_derivative(dtype, rtol, backend, monkeypatch):
    expected = value_and_gradient(dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for actual, wanted in zip(value_and_gradient(dtype), expected):
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=1e-6)
