"""Nested dicts of arrays: names of the leaves, and the differences of two trees."""

from collections.abc import Callable, Mapping
from typing import Any

Tree = Mapping[str, Any]


def flatten(tree: Tree, sep: str = "/") -> dict[str, Any]:
    """Return the leaves by path, as in "encoder/blocks/attn/qkv/kernel", in sorted order."""
    leaves: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping):
            leaves |= {f"{key}{sep}{name}": leaf for name, leaf in flatten(value, sep).items()}
        else:
            leaves[key] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of `flatten`'s result."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Return the tree of `function(name, leaf)`."""
    return unflatten({name: function(name, leaf) for name, leaf in flatten(tree).items()})


def logical_ndim(name: str, leaf: Any) -> int:
    """Return the number of axes without the depth axis of the stacked parameters of blocks."""
    return leaf.ndim - ("blocks" in name.split("/"))


def diff(expected: Tree, actual: Tree) -> list[str]:
    """Return one line per leaf that is missing (-), unexpected (+) or of another shape (!)."""
    shapes = [{n: tuple(x.shape) for n, x in flatten(t).items()} for t in (expected, actual)]
    lines = []
    for name in sorted(shapes[0] | shapes[1]):
        needed, given = (tree.get(name) for tree in shapes)
        if given is None:
            lines.append(f"- {name} {needed} is missing")
        elif needed is None:
            lines.append(f"+ {name} {given} is not part of the model")
        elif given != needed:
            lines.append(f"! {name} has shape {given}, the model needs {needed}")
    return lines
