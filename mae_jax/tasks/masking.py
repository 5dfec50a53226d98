"""Which patches an image keeps: exactly `len_keep` of them, whatever the sampling (Table 1f).

Every sampling is a noise per patch: the `len_keep` patches of lowest noise are kept. That is
the paper's "shuffle and drop the tail", and it makes every mask fill or trim itself, at random,
to the exact count that static shapes need.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key


class Mask(NamedTuple):
    """A partition of the n patches of every image, both parts in order of their noise."""

    ids_keep: Int[Array, "b k"]
    ids_masked: Int[Array, "b m"]

    def as_bool(self) -> Bool[Array, "b n"]:
        """True where a patch is masked, in image order."""
        rows = jnp.arange(len(self.ids_keep))[:, None]
        n = self.ids_keep.shape[1] + self.ids_masked.shape[1]
        return jnp.zeros((len(self.ids_keep), n), bool).at[rows, self.ids_masked].set(True)


def len_keep(num_patches: int, mask_ratio: float) -> int:
    """Number of kept patches; ValueError where nothing is kept or nothing is masked."""
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask.ratio={mask_ratio} must lie between 0 and 1, like the paper's .75")
    # As in the reference: this very float expression, so 100 patches at .9 keep 9 and not 10.
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise ValueError(
            f"mask.ratio={mask_ratio} keeps {kept} of {num_patches} patches; at least one must "
            "be kept and one masked"
        )
    return kept


def mask_from_noise(noise: Float[Array, "b n"], kept: int) -> Mask:
    """Keeps the `kept` patches of lowest noise in every row."""
    order = jnp.argsort(noise, axis=1)
    return Mask(order[:, :kept], order[:, kept:])


def sample_patches(
    key: Key[Array, ""], patches: Int[Array, "b m"], count: int
) -> Int[Array, "b q"]:
    """Some of the patches of every image: an independent uniform choice, whatever their order."""
    order = jnp.argsort(jax.random.uniform(key, patches.shape), axis=1)
    return jnp.take_along_axis(patches, order[:, :count], axis=1)


def random_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """An independent uniform choice for every image (the paper's default)."""
    return mask_from_noise(jax.random.uniform(key, (batch, grid[0] * grid[1])), kept)


def grid_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """Keeps one patch, drawn at random, of every 2x2 cell (Table 1f, "grid")."""
    check_grid(grid, kept)
    cells = (grid[0] // 2) * (grid[1] // 2)
    corner = jax.random.randint(key, (batch, cells), 0, 4)
    masked = corner[..., None] != jnp.arange(4)
    masked = rearrange(
        masked, "b (y x) (dy dx) -> b (y dy x dx)", y=grid[0] // 2, dy=2, x=grid[1] // 2, dx=2
    )
    return mask_from_noise(masked.astype(jnp.float32), kept)


def check_grid(grid: tuple[int, int], kept: int) -> None:
    """ValueError unless one of each 2x2 patches is exactly what is kept."""
    if grid[0] % 2 or grid[1] % 2 or kept * 4 != grid[0] * grid[1]:
        raise ValueError(
            f"mask.kind='grid' keeps one of each 2x2 patches: it needs mask.ratio=0.75 and an "
            f"even number of rows and columns, not {kept} kept of {grid[0]}x{grid[1]} patches"
        )


def block_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """Masks rectangles, then single patches where no more fit (Table 1f, "block").

    As BEiT does (Bao et al. 2022, algorithm 1): a rectangle has between 16 patches and what is
    still to be masked, and an aspect ratio between 0.3 and 1 / 0.3. Of 64, those that fit count.
    """
    noise_key, block_key = jax.random.split(key)
    noise = jax.random.uniform(noise_key, (batch, grid[0] * grid[1]))
    keys = jax.random.split(block_key, batch)
    blocks = jax.vmap(_rectangles, in_axes=(0, None, None))(keys, grid, grid[0] * grid[1] - kept)
    return mask_from_noise(noise + rearrange(blocks, "b y x -> b (y x)"), kept)


def _rectangles(
    key: Key[Array, ""], grid: tuple[int, int], wanted: int, attempts: int = 64
) -> Bool[Array, "y x"]:
    """The union of random rectangles of at most `wanted` patches in all; True = masked."""
    size = jnp.array(grid)
    row, column = jnp.indices(grid)

    def add(blocks, key):
        area_key, aspect_key, corner_key = jax.random.split(key, 3)
        left = wanted - blocks.sum()
        area = jax.random.uniform(area_key, minval=jnp.minimum(16, left), maxval=left)
        log_aspect = jax.random.uniform(aspect_key, minval=jnp.log(0.3), maxval=-jnp.log(0.3))
        sides = jnp.sqrt(area * jnp.exp(log_aspect * jnp.array([1.0, -1.0]))).round().astype(int)
        top, start = jax.random.randint(corner_key, (2,), 0, jnp.maximum(size - sides, 0) + 1)
        inside = (row >= top) & (row < top + sides[0])
        inside &= (column >= start) & (column < start + sides[1])
        grown = blocks | inside
        fits = (sides <= size).all() & (grown.sum() <= wanted)
        return jnp.where(fits, grown, blocks), None

    return jax.lax.scan(add, jnp.zeros(grid, bool), jax.random.split(key, attempts))[0]


def user_mask(masked: np.ndarray, batch: int, num_patches: int) -> Mask:
    """The mask of a boolean array, True = masked: [n] for all images, or [r, n], row i % r for i.

    Raises:
      ValueError: another shape or dtype, or rows that do not all mask equally many patches.
    """
    check_user_mask(masked, num_patches)
    rows = np.atleast_2d(masked)
    kept = num_patches - int(rows[0].sum())
    return mask_from_noise(jnp.asarray(rows[np.arange(batch) % len(rows)], jnp.float32), kept)


def check_user_mask(masked: np.ndarray, num_patches: int) -> None:
    """ValueError, naming the rows at fault, unless `user_mask` can use the array."""
    if masked.dtype != bool or masked.ndim not in (1, 2) or masked.shape[-1] != num_patches:
        raise ValueError(
            f"a user mask is a bool array [{num_patches}] or [batch, {num_patches}], True = "
            f"masked; this one is {masked.dtype} {list(masked.shape)}"
        )
    counts = np.atleast_2d(masked).sum(axis=1)
    usual = int(np.bincount(counts).argmax())
    odd = np.flatnonzero(counts != usual)
    if odd.size:
        named = ", ".join(f"row {row} masks {counts[row]}" for row in odd[:8])
        more = f" (and {odd.size - 8} more)" if odd.size > 8 else ""
        raise ValueError(
            f"every row of a user mask must mask equally many patches; most mask {usual}, "
            f"but {named}{more}"
        )
    if usual in (0, num_patches):
        raise ValueError(
            f"the user mask masks {usual} of {num_patches} patches; leave some of each"
        )


SAMPLERS = {"random": random_mask, "block": block_mask, "grid": grid_mask}
