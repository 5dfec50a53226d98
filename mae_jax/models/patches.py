"""Images as sequences of patches, and where each patch lies: pure functions.

The letters of every shape in this project: b batch, n patches of an image, k kept patches,
m masked patches (k + m = n), t tokens, d width, p values of one patch (patch * patch * channels),
h w c height, width and channels of an image.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped


def patch_grid(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches; ValueError where the patch does not divide the image."""
    for side in image_size:
        if side < patch or side % patch:
            below, above = side // patch * patch, (side // patch + 1) * patch
            use = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"model.image_size={tuple(image_size)} does not divide into patches of "
                f"model.patch={patch}: {side} = {side // patch} * {patch} + {side % patch}. "
                f"Use {use}."
            )
    return image_size[0] // patch, image_size[1] // patch


def patchify(images: Shaped[Array, "b h w c"], patch: int) -> Shaped[Array, "b n p"]:
    """Cuts images into patches, row by row; a patch is flattened as (row, column, channel)."""
    return rearrange(images, "b (gh r) (gw s) c -> b (gh gw) (r s c)", r=patch, s=patch)


def unpatchify(
    patches: Shaped[Array, "b n p"], patch: int, grid: tuple[int, int]
) -> Shaped[Array, "b h w c"]:
    """The inverse of `patchify`."""
    return rearrange(
        patches, "b (gh gw) (r s c) -> b (gh r) (gw s) c", r=patch, s=patch, gh=grid[0], gw=grid[1]
    )


def gather_patches(
    patches: Shaped[Array, "b n x"], indices: Int[Array, "b i"]
) -> Shaped[Array, "b i x"]:
    """Row by row, the patches at `indices`."""
    return jnp.take_along_axis(patches, indices[..., None], axis=1)


def sincos_pos_embed_2d(width: int, grid: tuple[int, int]) -> Float[np.ndarray, "n1 d"]:
    """MAE's fixed 2-D sine-cosine table, float32; row 0 is the cls token's and is zero.

    As in the reference: the first half of the channels encodes the column, the second the row;
    each half is all sines, then all cosines; computed in float64 (paper A.1).
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {width}")
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    table = np.concatenate(
        [f(position * frequencies) for position in (columns, rows) for f in (np.sin, np.cos)],
        axis=1,
    )
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def bicubic_weights(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """1-D bicubic resampling as torch does it: a = -0.75, half-pixel centres, edges repeated.

    As in the reference: no antialiasing when shrinking, unlike `jax.image.resize` (a = -0.5).
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
    table: Float[np.ndarray, "old d"], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[np.ndarray, "new d"]:
    """The table (cls row first) for another grid of patches; the cls row stays as it is."""
    if len(table) != old_grid[0] * old_grid[1] + 1:
        raise ValueError(f"a table of {len(table)} rows is not cls + {old_grid} patches")
    cls, cells = table[:1], table[1:].reshape(*old_grid, -1)
    vertical, horizontal = (bicubic_weights(new, old) for new, old in zip(new_grid, old_grid))
    cells = np.einsum("yh,xw,hwd->yxd", vertical, horizontal, cells, optimize=True)
    return np.concatenate([cls, cells.reshape(-1, cells.shape[-1])]).astype(table.dtype)
