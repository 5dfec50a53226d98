"""Patches of images and the position embeddings of patches: pure functions.

Letters of array shapes in this project: b batch, n patches of an image, k kept patches, m masked
patches (k + m = n), t tokens (class tokens, then patches), d width (embedding dimension), p values
of a patch (height * width * channels), h w c height, width and channels of an image. The size of
a patch is its side, or its height and width, in pixels.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Shaped

from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides, height_width


def patch_grid(image_size: tuple[int, int], patch: Sides) -> tuple[int, int]:
    """Return rows and columns of patches.

    Raises:
      UserError: the height or width of images (pixels) is not a multiple of the patch size.
    """
    height, width = height_width(patch)
    for name, side, step in (("height", image_size[0], height), ("width", image_size[1], width)):
        if side < step or side % step:
            below, above = side // step * step, (side // step + 1) * step
            use = f"{below} or {above}" if below else f"{above}"
            which = f"the {name} of " if height != width else ""
            raise UserError(
                f"must be a multiple of {which}model.patch={patch}: {side} = {side // step} * "
                f"{step} + {side % step}. Use {use}.",
                key="model.image_size",
                value=tuple(image_size),
            )
    return image_size[0] // height, image_size[1] // width


def num_patch_values(patch: Sides, channels: int) -> int:
    """Return the number of values of a patch: its pixels times the channels."""
    return math.prod(height_width(patch)) * channels


def patchify(images: Shaped[Array, "b h w c"], patch: Sides) -> Shaped[Array, "b n p"]:
    """Cut images into patches, row by row, each flattened as (row, column, channel)."""
    height, width = height_width(patch)
    return rearrange(images, "b (gh r) (gw s) c -> b (gh gw) (r s c)", r=height, s=width)


def unpatchify(
    patches: Shaped[Array, "b n p"], patch: Sides, grid: tuple[int, int]
) -> Shaped[Array, "b h w c"]:
    """Invert `patchify`."""
    (height, width), (rows, columns) = height_width(patch), grid
    axes = dict(r=height, s=width, gh=rows, gw=columns)
    return rearrange(patches, "b (gh gw) (r s c) -> b (gh r) (gw s) c", **axes)


def patch_corners(grid: tuple[int, int], patch: Sides) -> Int[np.ndarray, "n 2"]:
    """Return the row and the column, in pixels, of the upper left corner of every patch."""
    return np.indices(grid).reshape(2, -1).T * height_width(patch)


def enlarge_grid(
    values: Shaped[np.ndarray, "b y x *c"], image_size: tuple[int, int]
) -> Shaped[np.ndarray, "b h w *c"]:
    """Repeat the values of patches for all their pixels in images of a height and width."""
    height, width = (new // old for new, old in zip(image_size, values.shape[1:3]))
    return values.repeat(height, axis=1).repeat(width, axis=2)


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
