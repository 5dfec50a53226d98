"""Masking strategies: counts, distributions and errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.tasks import masking
from mae_jax.utils.errors import UserError

KEY = jax.random.key(7)
SAMPLERS = {
    name: jax.jit(sampler, static_argnums=(1, 2, 3)) for name, sampler in masking.SAMPLERS.items()
}


def assert_partition(mask, batch, grid, kept):
    n = grid[0] * grid[1]
    assert mask.ids_keep.shape == (batch, kept)
    assert mask.ids_masked.shape == (batch, n - kept)
    ids = np.sort(np.concatenate(mask, axis=1), axis=1)
    np.testing.assert_array_equal(ids, np.tile(np.arange(n), (batch, 1)))


def as_bool(mask):
    """Return the mask as numpy, True where masked."""
    masked = np.zeros((len(mask.ids_keep), mask.ids_keep.shape[1] + mask.ids_masked.shape[1]), bool)
    np.put_along_axis(masked, np.asarray(mask.ids_masked), True, axis=1)
    return masked


def test_len_keep_is_the_references(golden):
    reference = json.loads((golden / "lr_sched" / "len_keep.json").read_text())
    for row in reference["table"] + reference["traps"]:
        n, ratio, expected = row["L"], row["mask_ratio"], row["len_keep"]
        if 0 < expected < n:
            assert masking.len_keep(n, ratio) == expected
        else:
            with pytest.raises(UserError, match=f"keeps {expected} of {n}"):
                masking.len_keep(n, ratio)


@pytest.mark.parametrize("ratio", [1.0, 0.999, 0.0, -0.5, 1.5, float("nan")])
def test_ratios_that_keep_or_mask_nothing_are_invalid(ratio):
    with pytest.raises(UserError, match=f"mask.ratio={ratio}"):
        masking.len_keep(196, ratio)


@pytest.mark.parametrize(
    ("kind", "grid", "kept"),
    [
        ("random", (14, 14), 49),
        ("random", (2, 2), 1),
        ("random", (4, 6), 23),
        ("block", (14, 14), 49),
        ("block", (14, 14), 195),
        ("block", (2, 2), 1),
        ("block", (16, 2), 1),
        ("grid", (14, 14), 49),
        ("grid", (4, 6), 6),
        ("grid", (2, 2), 1),
        ("grid", (16, 2), 8),
    ],
)
def test_number_of_kept_patches(kind, grid, kept):
    mask = SAMPLERS[kind](KEY, 64, grid, kept)
    assert_partition(mask, 64, grid, kept)
    assert len(np.unique(as_bool(mask), axis=0)) > 3, "images have different masks"


def test_masks_in_image_order():
    mask = SAMPLERS["random"](KEY, 64, (4, 4), 4)
    np.testing.assert_array_equal(mask.as_bool(), as_bool(mask))


def test_random_masks_are_uniform():
    masked = as_bool(SAMPLERS["random"](KEY, 8192, (4, 4), 4))
    np.testing.assert_allclose(masked.mean(0), 0.75, atol=0.03)


def test_grid_masks_keep_one_patch_of_each_2x2_cell():
    masked = as_bool(SAMPLERS["grid"](KEY, 512, (6, 8), 12))
    cells = masked.reshape(512, 3, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    assert (cells.sum(axis=1) == 3).all()
    np.testing.assert_allclose(cells.mean(0), 0.75, atol=0.02)


@pytest.mark.parametrize(("grid", "kept"), [((14, 14), 98), ((7, 14), 24), ((14, 7), 24)])
def test_grid_masks_need_a_ratio_of_three_quarters_and_an_even_grid(grid, kept):
    with pytest.raises(UserError, match="mask.kind='grid' keeps one of each 2x2"):
        masking.grid_mask(KEY, 2, grid, kept)


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_sampled_patches_are_uniform(kind):
    """Also if the masked patches are in image order; the standard error is 0.005."""
    mask = SAMPLERS[kind](KEY, 8192, (4, 4), 4)
    ids = np.asarray(masking.sample_patches(jax.random.key(8), mask.ids_masked, 3))
    masked = as_bool(mask)
    assert np.take_along_axis(masked, ids, axis=1).all()
    sampled = np.zeros_like(masked)
    np.put_along_axis(sampled, ids, True, axis=1)
    assert (sampled.sum(axis=1) == 3).all(), "no patch twice"
    np.testing.assert_allclose(sampled.sum(axis=0) / masked.sum(axis=0), 3 / 12, atol=0.03)
    both = (sampled[:, :-1] & sampled[:, 1:]).sum() / (masked[:, :-1] & masked[:, 1:]).sum()
    np.testing.assert_allclose(both, 3 / 12 * 2 / 11, atol=0.01, err_msg="pairs of neighbors")


def test_block_masks_are_contiguous():
    """Neighbors agree far more often than in random masks."""

    def agreement(kind):
        masked = as_bool(SAMPLERS[kind](KEY, 256, (14, 14), 98)).reshape(256, 14, 14)
        return (masked[:, :, 1:] == masked[:, :, :-1]).mean()

    assert agreement("random") < 0.52
    assert agreement("block") > 0.75


def test_user_masks_of_one_row_and_of_several():
    one = np.arange(6) % 3 > 0
    assert_partition(masking.user_mask(one, 5, 6), 5, (2, 3), 2)
    rows = np.stack([one, one[::-1]])
    np.testing.assert_array_equal(as_bool(masking.user_mask(rows, 3, 6)), rows[[0, 1, 0]])


def test_invalid_user_masks():
    rows = np.tile(np.arange(6) < 4, (5, 1))
    rows[3, 0] = False
    with pytest.raises(UserError, match="most mask 4, but row 3 masks 3"):
        masking.user_mask(rows, 5, 6)
    with pytest.raises(UserError, match=r"bool array \[6\]"):
        masking.user_mask(np.ones(6), 1, 6)
    with pytest.raises(UserError, match="masks 6 of 6"):
        masking.user_mask(np.ones(6, bool), 1, 6)


def test_masks_do_not_depend_on_jit():
    args = (KEY, 4, (4, 4), 4)
    eager, jitted = masking.grid_mask(*args), SAMPLERS["grid"](*args)
    np.testing.assert_array_equal(jnp.concatenate(eager, 1), jnp.concatenate(jitted, 1))
