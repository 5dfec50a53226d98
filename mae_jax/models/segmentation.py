"""Segmentation on top of an encoder's patch tokens: a linear head, and bilinear upsampling."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from mae_jax.models.classifier import BatchNorm


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
