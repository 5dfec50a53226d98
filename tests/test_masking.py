import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.tasks import masking
from mae_jax.utils.errors import UserError

KEY = jax.random.key(7)


def assert_partition(mask, batch, grid, kept):
    n = grid[0] * grid[1]
    assert mask.ids_keep.shape == (batch, kept)
    assert mask.ids_masked.shape == (batch, n - kept)
    everything = np.sort(np.concatenate(mask, axis=1), axis=1)
    np.testing.assert_array_equal(everything, np.tile(np.arange(n), (batch, 1)))


def test_len_keep_is_the_references(golden):
    reference = json.loads((golden / "lr_sched" / "len_keep.json").read_text())
    for row in reference["table"] + reference["traps"]:
        n, ratio, expected = row["L"], row["mask_ratio"], row["len_keep"]
        if 0 < expected < n:
            assert masking.len_keep(n, ratio) == expected
        else:
            with pytest.raises(UserError, match=f"keeps {expected} of {n}"):
                masking.len_keep(n, ratio)


@pytest.mark.parametrize("ratio", [1.0, 0.999, 0.0, -0.5, 1.5])
def test_ratio_that_leaves_nothing_to_do(ratio):
    with pytest.raises(UserError, match="mask.ratio"):
        masking.len_keep(196, ratio)


@pytest.mark.parametrize("kind", ["random", "block", "grid"])
@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (2, 2), (16, 2)])
def test_every_sampling_keeps_exactly_its_quarter(kind, grid):
    kept = grid[0] * grid[1] // 4
    mask = masking.SAMPLERS[kind](KEY, 64, grid, kept)
    assert_partition(mask, 64, grid, kept)
    assert len(np.unique(mask.as_bool(), axis=0)) > 3, "every image has a mask of its own"


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("kept", [1, 7, 98, 195])
def test_any_count_can_be_kept(kind, kept):
    assert_partition(masking.SAMPLERS[kind](KEY, 8, (14, 14), kept), 8, (14, 14), kept)


def test_random_masks_are_uniform():
    masked = masking.random_mask(KEY, 8192, (4, 4), 4).as_bool()
    np.testing.assert_allclose(masked.mean(0), 0.75, atol=0.03)


def test_grid_keeps_one_of_each_2x2():
    masked = masking.grid_mask(KEY, 512, (6, 8), 12).as_bool()
    cells = np.asarray(masked).reshape(512, 3, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
    assert (cells.sum(axis=1) == 3).all()
    np.testing.assert_allclose(cells.mean(0), 0.75, atol=0.02)


@pytest.mark.parametrize(("grid", "kept"), [((14, 14), 98), ((7, 14), 24), ((14, 7), 24)])
def test_grid_refuses_other_ratios_and_odd_grids(grid, kept):
    with pytest.raises(UserError, match="one of each 2x2"):
        masking.grid_mask(KEY, 2, grid, kept)


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_a_choice_of_masked_patches_is_uniform(kind):
    """Also where the masked patches come in image order; deviations are of 8192 coins: 0.005."""
    mask = masking.SAMPLERS[kind](KEY, 8192, (4, 4), 4)
    chosen = np.asarray(masking.sample_patches(jax.random.key(8), mask.ids_masked, 3))
    masked = np.asarray(mask.as_bool())
    assert np.take_along_axis(masked, chosen, axis=1).all()
    picked = np.zeros_like(masked)
    np.put_along_axis(picked, chosen, True, axis=1)
    assert (picked.sum(axis=1) == 3).all(), "no patch twice"
    np.testing.assert_allclose(picked.sum(axis=0) / masked.sum(axis=0), 3 / 12, atol=0.03)
    both = (picked[:, :-1] & picked[:, 1:]).sum() / (masked[:, :-1] & masked[:, 1:]).sum()
    np.testing.assert_allclose(both, 3 / 12 * 2 / 11, atol=0.01, err_msg="pairs of neighbours")


def test_block_masks_are_blocky():
    """Neighbours share their fate far more often than under independent masks."""

    def agreement(kind):
        masked = np.asarray(masking.SAMPLERS[kind](KEY, 256, (14, 14), 98).as_bool())
        masked = masked.reshape(256, 14, 14)
        return (masked[:, :, 1:] == masked[:, :, :-1]).mean()

    assert agreement("random") < 0.52
    assert agreement("block") > 0.75


def test_user_mask_of_one_row_and_of_many():
    one = np.arange(6) % 3 > 0
    assert_partition(masking.user_mask(one, 5, 6), 5, (2, 3), 2)
    rows = np.stack([one, one[::-1]])
    mask = masking.user_mask(rows, 2, 6)
    np.testing.assert_array_equal(mask.as_bool(), rows)
    three = masking.user_mask(rows, 3, 6)
    np.testing.assert_array_equal(three.as_bool(), rows[[0, 1, 0]])


def test_user_mask_names_the_rows_at_fault():
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
    eager = masking.block_mask(*args)
    jitted = jax.jit(masking.block_mask, static_argnums=(1, 2, 3))(*args)
    np.testing.assert_array_equal(jnp.concatenate(eager, 1), jnp.concatenate(jitted, 1))
