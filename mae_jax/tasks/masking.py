"""Masking strategies: random, block, grid (paper Table 1f) and user masks.

Every strategy assigns noise to the patches and keeps the `len_keep` patches of lowest noise, as in
the paper's "shuffle and drop the tail": so every image keeps the same number of patches, which
static shapes need. Random masks may hide whole cells of patches, as Pixio's (`cell_mask`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Key

from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides, height_width


class Mask(NamedTuple):
    """A partition of the n patches of every image, both parts sorted by noise."""

    ids_keep: Int[Array, "b k"]
    ids_masked: Int[Array, "b m"]

    def as_bool(self) -> Bool[Array, "b n"]:
        """Return the mask in image order, True where a patch is masked."""
        rows = jnp.arange(len(self.ids_keep))[:, None]
        n = self.ids_keep.shape[1] + self.ids_masked.shape[1]
        return jnp.zeros((len(self.ids_keep), n), bool).at[rows, self.ids_masked].set(True)


def len_keep(num_patches: int, mask_ratio: float, unit: str = "patches") -> int:
    """Return the number of kept patches, or of kept cells: `unit` names them in errors.

    Raises:
      UserError: the ratio is not within 0 to 1, or no patch is kept or none is masked.
    """
    error = lambda problem: UserError(problem, key="mask.ratio", value=mask_ratio)
    if not 0 <= mask_ratio <= 1:
        raise error("must be within 0 to 1, as the paper's 0.75")
    # As in the reference: exactly this float expression, so 100 patches at 0.9 keep 9 and not 10.
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 < kept < num_patches:
        raise error(f"keeps {kept} of {num_patches} {unit}; it must keep and mask at least one")
    return kept


def mask_from_noise(noise: Float[Array, "b n"], kept: int) -> Mask:
    """Keep the `kept` patches of lowest noise in every row."""
    order = jnp.argsort(noise, axis=1)
    return Mask(order[:, :kept], order[:, kept:])


def sample_patches(
    key: Key[Array, ""],
    patches: Int[Array, "b m"],
    count: int,
    last: Bool[Array, "b m"] | None = None,
) -> Int[Array, "b q"]:
    """Sample `count` of the given patches of every image, uniformly without replacement.

    Args:
      last: patches to sample only if the others are too few.
    """
    noise = jax.random.uniform(key, patches.shape)
    order = jnp.argsort(noise if last is None else noise + last, axis=1)
    return jnp.take_along_axis(patches, order[:, :count], axis=1)


def random_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """Sample the kept patches of every image uniformly (the paper's default)."""
    return mask_from_noise(jax.random.uniform(key, (batch, grid[0] * grid[1])), kept)


def cell_grid(grid: tuple[int, int], cell: int, patch: Sides) -> tuple[int, int]:
    """Return rows and columns of cells of `cell` patches a side.

    Args:
      patch: side of a patch, or its height and width, pixels, to name the image sizes that would
        do.

    Raises:
      UserError: the cells do not divide the grid of patches.
    """
    if cell < 1:
        raise UserError("must be at least 1", key="mask.cell", value=cell)
    if grid[0] % cell or grid[1] % cell:
        divides = lambda n: not (grid[0] % n or grid[1] % n) and n * n < grid[0] * grid[1]
        divisors = [n for n in range(1, min(grid) + 1) if divides(n)]  # several cells each
        sizes = [
            sorted({max(n // cell, 2) * cell * side, -(-n // cell) * cell * side})
            for n, side in zip(grid, height_width(patch))
        ]
        height, width = (" or ".join(map(str, size)) for size in sizes)
        raise UserError(
            f"does not divide the {grid[0]}x{grid[1]} patches of an image: use "
            f"mask.cell={' or '.join(map(str, divisors))}, or model.image_size with a height of "
            f"{height} and a width of {width}",
            key="mask.cell",
            value=cell,
        )
    return grid[0] // cell, grid[1] // cell


def cell_mask(cells: Mask, grid: tuple[int, int], cell: int) -> Mask:
    """Return the mask of patches of a mask of cells, which are `cell` patches a side.

    As in the reference of Pixio: cells keep their order; their patches follow row by row.

    Args:
      cells: indices of cells, numbered row by row.
      grid: rows and columns of patches.
    """
    columns = grid[1] // cell
    inside = (jnp.arange(cell)[:, None] * grid[1] + jnp.arange(cell)).reshape(-1)

    def patches(ids: Int[Array, "b i"]) -> Int[Array, "b j"]:
        corners = ids // columns * cell * grid[1] + ids % columns * cell
        return rearrange(corners[..., None] + inside, "b i inside -> b (i inside)")

    return Mask(patches(cells.ids_keep), patches(cells.ids_masked))


def grid_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """Keep one random patch of every 2x2 cell (Table 1f, "grid")."""
    check_grid(grid, kept)
    cells = (grid[0] // 2) * (grid[1] // 2)
    corner = jax.random.randint(key, (batch, cells), 0, 4)
    masked = corner[..., None] != jnp.arange(4)
    masked = rearrange(
        masked, "b (y x) (dy dx) -> b (y dy x dx)", y=grid[0] // 2, dy=2, x=grid[1] // 2, dx=2
    )
    return mask_from_noise(masked.astype(jnp.float32), kept)


def check_grid(grid: tuple[int, int], kept: int) -> None:
    """Raise UserError unless a grid mask keeps this number of patches."""
    if grid[0] % 2 or grid[1] % 2 or kept * 4 != grid[0] * grid[1]:
        raise UserError(
            "keeps one of each 2x2 patches: it needs mask.ratio=0.75 and an even number of rows "
            f"and columns, not {kept} kept of {grid[0]}x{grid[1]} patches",
            key="mask.kind",
            value="grid",
        )


def block_mask(key: Key[Array, ""], batch: int, grid: tuple[int, int], kept: int) -> Mask:
    """Mask random rectangles, then single patches for the rest (Table 1f, "block").

    As in BEiT (Bao et al. 2022, algorithm 1): the area of a rectangle is between 16 patches and the
    number still to be masked, its aspect ratio between 0.3 and 1 / 0.3; there are 64 attempts.
    """
    noise_key, block_key = jax.random.split(key)
    noise = jax.random.uniform(noise_key, (batch, grid[0] * grid[1]))
    keys = jax.random.split(block_key, batch)
    blocks = jax.vmap(_rectangles, in_axes=(0, None, None))(keys, grid, grid[0] * grid[1] - kept)
    return mask_from_noise(noise + rearrange(blocks, "b y x -> b (y x)"), kept)


def _rectangles(
    key: Key[Array, ""], grid: tuple[int, int], wanted: int, attempts: int = 64
) -> Bool[Array, "y x"]:
    """Return the union, True = masked, of random rectangles with at most `wanted` patches."""
    size = jnp.array(grid)
    row, column = jnp.indices(grid)

    def add(blocks, key):
        area_key, aspect_key, corner_key = jax.random.split(key, 3)
        rest = wanted - blocks.sum()
        area = jax.random.uniform(area_key, minval=jnp.minimum(16, rest), maxval=rest)
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
    """Return the mask of a boolean array, True = masked: [n], or [r, n] with row i % r for image i.

    Raises:
      UserError: wrong shape or dtype, or rows that mask different numbers of patches.
    """
    check_user_mask(masked, num_patches)
    rows = np.atleast_2d(masked)
    kept = num_patches - int(rows[0].sum())
    return mask_from_noise(jnp.asarray(rows[np.arange(batch) % len(rows)], jnp.float32), kept)


def check_user_mask(masked: np.ndarray, num_patches: int) -> None:
    """Raise UserError, with the numbers of the bad rows, unless `user_mask` accepts the array."""
    if masked.dtype != bool or masked.ndim not in (1, 2) or masked.shape[-1] != num_patches:
        raise UserError(
            f"a user mask must be a bool array [{num_patches}] or [batch, {num_patches}], True = "
            f"masked; this one is {masked.dtype} {list(masked.shape)}"
        )
    counts = np.atleast_2d(masked).sum(axis=1)
    mode = int(np.bincount(counts).argmax())
    bad_rows = np.flatnonzero(counts != mode)
    if bad_rows.size:
        named = ", ".join(f"row {row} masks {counts[row]}" for row in bad_rows[:8])
        more = f" (and {bad_rows.size - 8} more)" if bad_rows.size > 8 else ""
        raise UserError(
            f"all rows of a user mask must mask the same number of patches; most mask {mode}, "
            f"but {named}{more}"
        )
    if mode in (0, num_patches):
        raise UserError(
            f"the user mask masks {mode} of {num_patches} patches; it must keep and mask at least "
            "one"
        )


SAMPLERS = {"random": random_mask, "block": block_mask, "grid": grid_mask}
