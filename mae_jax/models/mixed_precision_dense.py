"""A linear layer in a narrow type, whose parameters get their gradients in float32."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def mixed_precision_dense(
    x: Float[Array, "r x"],
    kernel: Float[Array, "x y"],
    bias: Float[Array, " y"],
    narrow: Float[Array, "x y"],
) -> Float[Array, "r y"]:
    """`x @ kernel + bias` in the type of x, where `narrow` is the kernel in that type.

    The product is that of `narrow`; the gradient goes to `kernel` and is float32, as is the bias's.
    Autodiff alone would round both to the type of x before they are added up over devices.
    """
    return _forward(x, kernel, bias, narrow)[0]


def _forward(x, kernel, bias, narrow):
    y = _product(x, narrow, 0) + bias.astype(_product_type(x))
    return y.astype(x.dtype), (x, narrow)


def _backward(saved, gradient):
    x, narrow = saved
    dx = _product(gradient, narrow, 1).astype(x.dtype)
    dbias = jnp.sum(gradient, axis=0, dtype=jnp.float32)
    return dx, _outer(x, gradient), dbias, jnp.zeros_like(narrow)


mixed_precision_dense.defvjp(_forward, _backward)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _product_type(x: Array):
    # XLA's CPU backend widens the operands of a product in bfloat16 unless it may give float32; a
    # GPU adds up in float32 either way, and writes half as much.
    return jnp.float32 if _on_cpu() else x.dtype


def _product(x: Float[Array, "r i"], kernel: Array, axis: int) -> Float[Array, "r o"]:
    """Rows of x times the kernel, along this axis of the kernel."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=_product_type(x))


def _outer(x: Float[Array, "r x"], gradient: Float[Array, "r y"]) -> Float[Array, "x y"]:
    """`x.T @ gradient` in float32."""
    width = x.shape[1]
    if _on_cpu() and width % 2 == 0:
        # As a transposed copy in two halves the CPU multiplies it without widening the operands,
        # twice as fast; as one matrix XLA would undo the transposition.
        halves = lax.optimization_barrier(x.T).reshape(2, width // 2, len(x))
        product = jnp.dot(halves, gradient, preferred_element_type=jnp.float32)
        return product.reshape(width, gradient.shape[1])
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, gradient, dimensions, preferred_element_type=jnp.float32)
