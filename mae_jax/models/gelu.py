"""The exact GELU (Hendrycks & Gimpel 2016)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Compute the exact GELU in float32.

    As in the reference: with erf, not flax's default tanh approximation (nor erfc, slower on CPUs).
    The backward pass multiplies by a saved derivative, or, on CPUs, computes it again from x.
    """
    if jax.default_backend() == "cpu":
        return _gelu_recomputed(x)
    # A matrix, as the product before it: XLA fuses nothing across a reshape.
    return _gelu_with_derivative(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def _gelu(x: Array) -> Array:
    exact = x.astype(jnp.float32)
    return (0.5 * exact * (1.0 + jax.lax.erf(exact * 0.5**0.5))).astype(x.dtype)


def _derivative(x: Array) -> Array:
    exact = x.astype(jnp.float32)
    probability = 0.5 * (1.0 + jax.lax.erf(exact * 0.5**0.5))
    density = jnp.exp(-0.5 * exact**2) * (2 * jnp.pi) ** -0.5
    return (probability + exact * density).astype(x.dtype)


def _forward(x: Array) -> tuple[Array, Array]:
    # Without the barriers a GPU would compute the two in a kernel each, and XLA would keep x in
    # float32 and compute erf again in every product that follows.
    if jax.default_backend() == "gpu":
        x = jax.lax.optimization_barrier(x)
    return jax.lax.optimization_barrier((_gelu(x), _derivative(x)))


def _backward(derivative: Array, gradient: Array) -> tuple[Array]:
    return (derivative * gradient,)


_gelu_recomputed = jax.checkpoint(_gelu, prevent_cse=False)
_gelu_with_derivative = jax.custom_vjp(_gelu)
_gelu_with_derivative.defvjp(_forward, _backward)
