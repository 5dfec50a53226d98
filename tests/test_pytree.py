import numpy as np

from mae_jax.utils.pytree import diff, flatten, logical_ndim, map_with_path, unflatten

TREE = {"b": {"blocks": {"w": np.zeros((2, 3, 4))}, "bias": np.zeros(3)}, "a": np.zeros((1, 1, 3))}


def test_flatten_and_unflatten():
    leaves = flatten(TREE)
    assert list(leaves) == ["a", "b/bias", "b/blocks/w"]
    assert flatten(unflatten(leaves)) == leaves
    assert flatten({"a": {"b": 1}, "e": None}, sep=".") == {"a.b": 1, "e": None}


def test_logical_ndim_leaves_out_the_depth_of_stacked_blocks():
    assert flatten(map_with_path(logical_ndim, TREE)) == {"a": 3, "b/bias": 1, "b/blocks/w": 2}


def test_diff_has_one_line_per_leaf():
    other = {"a": np.zeros((1, 1, 5)), "b": {"bias": np.zeros(3), "new": np.zeros(1)}}
    assert diff(TREE, TREE) == []
    assert diff(TREE, other) == [
        "! a has shape (1, 1, 5), the model needs (1, 1, 3)",
        "- b/blocks/w (2, 3, 4) is missing",
        "+ b/new (1,) is not part of the model",
    ]
