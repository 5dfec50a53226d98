"""A linear layer in low precision (bfloat16) with float32 gradients of its parameters."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mae_jax.models.tpu_attention import SUBLANES


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def mixed_precision_dense(
    x: Float[Array, "r x"],
    kernel: Float[Array, "x y"],
    bias: Float[Array, " y"],
    cast_kernel: Float[Array, "x y"],
    parts: int = 1,
) -> list[Float[Array, "r z"]]:
    """Compute `x @ kernel + bias` in x.dtype, in equal parts of the columns.

    The product uses `cast_kernel`, the kernel in x.dtype; gradients go to `kernel` and `bias`, in
    float32. Autodiff would round both to x.dtype before they are summed over devices.
    """
    return _forward(x, kernel, bias, cast_kernel, parts)[0]


def _forward(x, kernel, bias, cast_kernel, parts):
    kernels, biases = jnp.split(cast_kernel, parts, axis=1), jnp.split(bias, parts)
    biases = [bias.astype(_matmul_dtype(x)) for bias in biases]
    if not _on_cpu():
        # A GPU adds a bias, and a residual after it, in the same kernel as the product, unless that
        # would also have to cast or slice the bias.
        biases = lax.optimization_barrier(biases)
    y = [(_matmul(x, each, 0) + bias).astype(x.dtype) for each, bias in zip(kernels, biases)]
    return y, (x, cast_kernel)


def _backward(parts, saved, gradients):
    x, cast_kernel = saved
    kernels = jnp.split(cast_kernel, parts, axis=1)
    dx = sum(_matmul(dy, kernel, 1) for dy, kernel in zip(gradients, kernels)).astype(x.dtype)
    gradient = jnp.concatenate(gradients, axis=1)
    if parts > 1 and jax.default_backend() == "tpu":
        # A TPU reads concatenated arrays slowly, and sums faster by a product with rows of ones.
        ones = jnp.ones((len(x), SUBLANES), x.dtype)
        dbias = jnp.concatenate([_outer(ones, dy)[0] for dy in gradients])
    else:
        dbias = jnp.sum(gradient, axis=0, dtype=jnp.float32)
    return dx, _outer(x, gradient), dbias, jnp.zeros_like(cast_kernel)


mixed_precision_dense.defvjp(_forward, _backward)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _matmul_dtype(x: Array):
    # XLA's CPU backend casts bfloat16 operands to float32 unless the output is float32. A GPU
    # accumulates in float32 either way, and writes half as much.
    return jnp.float32 if _on_cpu() else x.dtype


def _matmul(x: Float[Array, "r i"], kernel: Array, axis: int) -> Float[Array, "r o"]:
    """Contract the rows of x with this axis of the kernel."""
    dimensions = (((1,), (axis,)), ((), ()))
    return lax.dot_general(x, kernel, dimensions, preferred_element_type=_matmul_dtype(x))


def _outer(x: Float[Array, "r x"], gradient: Float[Array, "r y"]) -> Float[Array, "x y"]:
    """Compute `x.T @ gradient` in float32."""
    width = x.shape[1]
    if _on_cpu() and width % 2 == 0:
        # The CPU multiplies a transposed copy in two halves without casting it, twice as fast; XLA
        # would undo the transposition of a single matrix.
        halves = lax.optimization_barrier(x.T).reshape(2, width // 2, len(x))
        product = jnp.dot(halves, gradient, preferred_element_type=jnp.float32)
        return product.reshape(width, gradient.shape[1])
    dimensions = (((0,), (0,)), ((), ()))
    return lax.dot_general(x, gradient, dimensions, preferred_element_type=jnp.float32)
