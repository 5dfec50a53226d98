"""Patches and position embeddings against the official code and torch."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.patches import (
    bicubic_weights,
    interpolate_pos_embed,
    patch_grid,
    patchify,
    sincos_pos_embed_2d,
    unpatchify,
)
from mae_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def tables(golden):
    return np.load(golden / "pos_embed" / "pos_embed.npz")


def test_sincos_table_is_the_references(tables):
    table = sincos_pos_embed_2d(32, (4, 4))
    np.testing.assert_allclose(table, tables["sincos_32_4"], atol=1e-6)
    several = sincos_pos_embed_2d(32, (4, 4), class_tokens=3)
    assert not several[:3].any()
    np.testing.assert_array_equal(several[3:], table[1:])


SIZES = [(512, 14), (768, 14), (1024, 14), (1280, 16), (512, 16)]


@pytest.mark.parametrize(("width", "side"), SIZES)
def test_rows_of_larger_sincos_tables_are_the_references(golden, tables, width, side):
    name = f"sincos_{width}_{side}"
    rows = json.loads((golden / "pos_embed" / "pos_embed.json").read_text())[name]["rows_index"]
    table = sincos_pos_embed_2d(width, (side, side))
    np.testing.assert_allclose(table[rows], tables[f"{name}_rows"], atol=1e-6)


def test_sincos_table_of_a_wide_grid_encodes_the_column_first():
    table = sincos_pos_embed_2d(8, (2, 3))[1:].reshape(2, 3, 8)
    assert (table[0, :, :4] == table[1, :, :4]).all()  # the first half does not depend on the row
    assert (table[:, 0, 4:] == table[:, 2, 4:]).all()  # the second does not depend on the column
    np.testing.assert_allclose(table[0, 2, :4], [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("14to7_d32_random", 14, 7), ("16to32_d16_random", 16, 32)],
)
def test_interpolation_is_torchs_bicubic(tables, name, old, new):
    source = tables[f"interp_{name}_src"][0]
    table = interpolate_pos_embed(source, (old, old), (new, new))
    np.testing.assert_allclose(table, tables[f"interp_{name}_out"][0], atol=1e-5)
    weights = tables[f"bicubic_1d_{old}to{new}"]
    np.testing.assert_allclose(bicubic_weights(new, old), weights, atol=1e-5)


def test_interpolation_of_a_non_square_grid_is_separable():
    rows = np.repeat(np.arange(4.0), 6)[:, None]  # depends on the row only
    table = np.concatenate([[[9.0]], rows])
    interpolated = interpolate_pos_embed(table, (4, 6), (8, 3))
    assert interpolated[0] == 9
    cells = interpolated[1:].reshape(8, 3)
    np.testing.assert_allclose(cells, np.repeat(cells[:, :1], 3, axis=1))
    np.testing.assert_allclose(cells[:, 0], bicubic_weights(8, 4) @ np.arange(4.0))


def test_patchify_of_non_square_images():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 5].reshape(2, 2, 3), images[1, 2:, 4:])
    np.testing.assert_array_equal(unpatchify(patches, 2, (2, 3)), images)


def test_image_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(UserError, match=r"225 = 14 \* 16 \+ 1. Use 224 or 240"):
        patch_grid((224, 225), 16)
