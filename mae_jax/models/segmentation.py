"""Segmentation on top of an encoder's patch tokens: heads, and bilinear upsampling."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mae_jax.models.batch_norm import BatchNorm
from mae_jax.models.gelu import gelu
from mae_jax.models.layers import ExecutionConfig, layer_norm

HEADS = ("linear", "upsample")
LEVELS = 4  # of UpsampleHead


class LinearHead(nn.Module):
    """BatchNorm with a learned scale and bias, and one linear layer for all patches.

    As BatchNorm2d and a 1x1 convolution in torch; also its initialization.
    """

    num_classes: int

    @nn.compact
    def __call__(self, grid: Float[Array, "b y x d"], train: bool) -> Float[Array, "b y x classes"]:
        normalized = BatchNorm(eps=1e-5, affine=True, name="head_norm")(grid, train)
        bound = grid.shape[-1] ** -0.5
        uniform = lambda key, shape, dtype=jnp.float32: jax.random.uniform(
            key, shape, dtype, -bound, bound
        )
        head = nn.Dense(self.num_classes, kernel_init=uniform, bias_init=uniform, name="head")
        return head(normalized)


def bilinear_weights(
    new: int, old: int, *, align_corners: bool = False
) -> Float[np.ndarray, "new old"]:
    """Return the matrix of torch's 1-D linear interpolation, without antialiasing.

    Args:
      align_corners: the centers of the first and last samples coincide; otherwise the borders of
        the samples (half-pixel centers), and values beyond the outermost centers are repeated.
    """
    if align_corners:
        position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    else:
        position = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    lower = np.minimum(position.astype(int), max(old - 2, 0))
    upper = np.minimum(lower + 1, old - 1)
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), lower), 1 - (position - lower))
    np.add.at(weights, (np.arange(new), upper), position - lower)
    return weights.astype(np.float32)


def upsample(
    values: Float[Array, "b y x c"], size: tuple[int, int], *, align_corners: bool = False
) -> Float[Array, "b h w c"]:
    """Interpolate bilinearly to height and width, as `bilinear_weights`."""
    rows, columns = (
        bilinear_weights(new, old, align_corners=align_corners)
        for new, old in zip(size, values.shape[1:3])
    )
    return jnp.einsum("hy,byxc,wx->bhwc", rows, values, columns, precision="highest")


class UpsampleHead(nn.Module):
    """Progressive upsampling of the patches (SETR-PUP, Zheng et al. 2021), before a linear layer.

    Four levels of a 3x3 convolution, LayerNorm and GELU, between which the grid doubles. The last
    doubling is that of the logits: interpolation and a linear layer commute.
    """

    width: int
    execution: ExecutionConfig = ExecutionConfig()

    @nn.compact
    def __call__(self, grid: Float[Array, "b y x d"]) -> Float[Array, "b y8 x8 width"]:
        """Return features in float32 at eight times the resolution."""
        dtype, shard = self.execution.dtype, self.execution.shard_activations
        x = grid.astype(dtype)
        for level in range(LEVELS):
            x = nn.Conv(self.width, (3, 3), dtype=dtype, name=f"conv{level}")(x)
            x = shard(gelu(layer_norm(f"norm{level}", 1e-6, dtype)(x)))
            if level < LEVELS - 1:
                size = 2 * x.shape[1], 2 * x.shape[2]
                x = shard(upsample(x, size).astype(dtype))
        return x.astype(jnp.float32)


def upsample_head_flops(grid: tuple[int, int], width: int, features: int) -> float:
    """Count the FLOPs of the convolutions of an `UpsampleHead` for an image (forward pass)."""
    positions = [grid[0] * grid[1] * 4**level for level in range(LEVELS)]
    inputs = [width] + [features] * (LEVELS - 1)
    return 2.0 * 9 * features * sum(n * size for n, size in zip(positions, inputs))
