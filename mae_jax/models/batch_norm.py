"""BatchNorm as in the reference: its running variance is unbiased."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

MOMENTUM = 0.1  # weight of a batch in the running statistics


class BatchNorm(nn.Module):
    """BatchNorm over all axes but the last one.

    Training normalizes by the statistics of the global batch and updates the running statistics;
    evaluation normalizes by the running statistics.

    affine: learned scale and bias, which a linear probe of classes does without.
    """

    eps: float = 1e-6
    affine: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], train: bool) -> Float[Array, "*b d"]:
        size, shape = x.size // x.shape[-1], x.shape[-1:]
        axes = tuple(range(x.ndim - 1))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32)  # batches seen
        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            mean, var = x.mean(axes), x.var(axes)
            # As in the reference: the running variance is unbiased, the batch's own is biased.
            unbiased = var * (size / max(size - 1, 1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.value = (1 - MOMENTUM) * running.value + MOMENTUM * new
            count.value += 1
        x = (x - mean) * jax.lax.rsqrt(var + self.eps)
        if not self.affine:
            return x
        scale = self.param("scale", nn.initializers.ones, shape)
        return x * scale + self.param("bias", nn.initializers.zeros, shape)
