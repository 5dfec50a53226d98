"""Parameters as nested dicts of arrays: their names, and how two such trees differ."""

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
    """The tree of `function(name, leaf)`."""
    return unflatten({name: function(name, leaf) for name, leaf in flatten(tree).items()})


def logical_ndim(name: str, leaf: Any) -> int:
    """Number of axes without the depth axis along which the parameters of blocks are stacked."""
    return leaf.ndim - ("blocks" in name.split("/"))


def diff(wanted: Tree, found: Tree) -> list[str]:
    """One line per leaf that is missing (-), unexpected (+) or of another shape (!)."""
    shapes = [{n: tuple(x.shape) for n, x in flatten(t).items()} for t in (wanted, found)]
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
