"""Parameters as nested dicts of arrays: their names, and how two such trees differ."""

from collections.abc import Callable, Mapping
from typing import Any

Tree = Mapping[str, Any]


def named_leaves(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """The leaves by path, as in "encoder/blocks/attn/qkv/kernel", in sorted order."""
    leaves = {}
    for key in sorted(tree):
        name, value = f"{prefix}{key}", tree[key]
        leaves |= named_leaves(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return leaves


def from_named(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `named_leaves`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """The tree of `function(name, leaf)`."""
    return from_named({name: function(name, leaf) for name, leaf in named_leaves(tree).items()})


def logical_ndim(name: str, leaf: Any) -> int:
    """Number of axes without the depth axis along which the parameters of blocks are stacked."""
    return leaf.ndim - ("blocks" in name.split("/"))


def differences(wanted: Tree, found: Tree) -> list[str]:
    """One line per leaf that is missing (-), unexpected (+) or of another shape (!)."""
    shapes = [{n: tuple(x.shape) for n, x in named_leaves(t).items()} for t in (wanted, found)]
    wanted_shapes, found_shapes = shapes
    lines = []
    for name in sorted(wanted_shapes | found_shapes):
        ours, theirs = wanted_shapes.get(name), found_shapes.get(name)
        if theirs is None:
            lines.append(f"- {name} {ours} is missing")
        elif ours is None:
            lines.append(f"+ {name} {theirs} is not part of the model")
        elif ours != theirs:
            lines.append(f"! {name} has shape {theirs}, the model needs {ours}")
    return lines
