"""Patches of images and the position embeddings of patches: pure functions.

Letters of array shapes in this project: b batch, n patches of an image, k kept patches, m masked
patches (k + m = n), t tokens (class tokens, then patches), d width (embedding dimension), p values
of a patch (patch * patch * channels), h w c height, width and channels of an image.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from mae_jax.utils.errors import UserError


def patch_grid(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return rows and columns of patches.

    Raises:
      UserError: the height or width of images (pixels) is not a multiple of the patch size.
    """
    for side in image_size:
        if side < patch or side % patch:
            below, above = side // patch * patch, (side // patch + 1) * patch
            use = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"must be a multiple of model.patch={patch}: {side} = {side // patch} * {patch} + "
                f"{side % patch}. Use {use}.",
                key="model.image_size",
                value=tuple(image_size),
            )
    return image_size[0] // patch, image_size[1] // patch


def patchify(images: Shaped[Array, "b h w c"], patch: int) -> Shaped[Array, "b n p"]:
    """Cut images into patches, row by row, each flattened as (row, column, channel)."""
    return rearrange(images, "b (gh r) (gw s) c -> b (gh gw) (r s c)", r=patch, s=patch)


def unpatchify(
    patches: Shaped[Array, "b n p"], patch: int, grid: tuple[int, int]
) -> Shaped[Array, "b h w c"]:
    """Invert `patchify`."""
    return rearrange(
        patches, "b (gh gw) (r s c) -> b (gh r) (gw s) c", r=patch, s=patch, gh=grid[0], gw=grid[1]
    )


def gather_patches(
    patches: Shaped[Array, "b n x"], indices: Int[Array, "b i"]
) -> Shaped[Array, "b i x"]:
    """Gather the patches of every image at its own indices."""
    return jnp.take_along_axis(patches, indices[..., None], axis=1)


def sincos_pos_embed_2d(
    width: int, grid: tuple[int, int], class_tokens: int = 1
) -> Float[np.ndarray, "t d"]:
    """Compute MAE's fixed 2-D sine-cosine position embedding, float32; class tokens have zeros.

    As in the reference: the first half of the channels encodes the column, the second the row;
    each half is all sines, then all cosines; computed in float64 (paper A.1).
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width divisible by 4, not {width}")
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    table = np.concatenate(
        [f(position * frequencies) for position in (columns, rows) for f in (np.sin, np.cos)],
        axis=1,
    )
    return np.concatenate([np.zeros((class_tokens, width)), table]).astype(np.float32)


def bicubic_weights(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """Return the matrix of torch's 1-D bicubic interpolation: a = -0.75, half-pixel centers.

    As in the reference: edges are repeated, and no antialiasing when downsampling, unlike
    `jax.image.resize` (a = -0.5).
    """
    a = -0.75
    position = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(position).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(position - (left + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        index = np.clip(left + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), index), np.where(x <= 1, near, far))
    return weights


def interpolate_pos_embed(
    table: Float[np.ndarray, "old d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    class_tokens: int = 1,
) -> Float[np.ndarray, "new d"]:
    """Interpolate a position embedding to another grid; the rows of class tokens, first, stay."""
    if len(table) != class_tokens + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"a table of {len(table)} rows is not {class_tokens} class tokens + {old_grid} patches"
        )
    cls, cells = table[:class_tokens], table[class_tokens:].reshape(*old_grid, -1)
    vertical, horizontal = (bicubic_weights(new, old) for new, old in zip(new_grid, old_grid))
    cells = np.einsum("yh,xw,hwd->yxd", vertical, horizontal, cells, optimize=True)
    return np.concatenate([cls, cells.reshape(-1, cells.shape[-1])]).astype(table.dtype)
