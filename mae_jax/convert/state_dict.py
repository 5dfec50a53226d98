"""Walks the tables of layouts in both directions: theirs to ours, and ours to theirs."""

from collections.abc import Iterable, Mapping

import numpy as np

from mae_jax.convert.key_maps import DIALECTS, LAYOUTS, Layout
from mae_jax.convert.model_info import ConvertError
from mae_jax.utils.pytree import diff

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


def detect_layout(names: Iterable[str], dialect: str | None, where: str) -> Layout:
    """The layout that knows most of the names.

    Raises:
      ConvertError: they are no dialect's, or another's than the one asked for.
    """
    if dialect not in (None, *DIALECTS):
        raise ConvertError(f"dialect={dialect!r}; use one of {', '.join(DIALECTS)}")
    names = list(names)
    known = {layout: sum(layout.match(name) is not None for name in names) for layout in LAYOUTS}
    best = max(LAYOUTS, key=lambda layout: known[layout])
    if known[best] < max(len(names) / 4, 4):
        shown = ", ".join(sorted(names)[:6]) or "none"
        raise ConvertError(
            f"{where} holds no MAE or ViT that is known here ({', '.join(DIALECTS)}); "
            f"its {len(names)} tensors are {shown}{', ...' if len(names) > 6 else ''}"
        )
    if dialect is None:
        return best
    asked = max((o for o in LAYOUTS if o.dialect == dialect), key=lambda layout: known[layout])
    if known[asked] < known[best] / 2:
        raise ConvertError(f"{where} is not {dialect}: its names are those of {best}")
    return asked


def find_mismatches(
    layout: Layout, shapes: Shapes, found: Mapping[str, np.ndarray], patch: int
) -> list[str]:
    """A line for every tensor of theirs that is missing, unexpected or of another shape or type."""
    wanted, mixed = {}, []
    for row in layout.rows:
        if row.param in shapes:
            shape = shapes[row.param]
            blank = np.broadcast_to(np.float32(0), shape[1:] if row.stacked else shape)
            names = row.names(shape[0] if shape else 0)
            for several in names:
                wanted |= dict(zip(several, row.from_param(blank, patch)))
            mixed += _mixed([name for several in names for name in several], found)
    return diff(wanted, found) + mixed


def _mixed(names: list[str], found: Mapping[str, np.ndarray]) -> list[str]:
    """A line for each tensor of another type than the first of those that make one array of ours.

    To stack them would change the bits of some.
    """
    types = {name: found[name].dtype for name in names if name in found}
    first = next(iter(types), "")
    return [
        f"! {name} is {dtype}, but {first} is {types[first]}: give all blocks one type"
        for name, dtype in types.items()
        if dtype != types[first]
    ]


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C")  # np.ascontiguousarray would give scalars an axis


def import_state_dict(layout: Layout, shapes: Shapes, tensors: Arrays) -> Arrays:
    """Arrays by our names; takes theirs out of `tensors`, so that memory holds each once."""
    arrays = {}
    for row in layout.rows:
        if row.param in shapes:
            depth = shapes[row.param][0] if row.stacked else 0
            parts = [
                row.to_param(*[tensors.pop(name) for name in names]) for names in row.names(depth)
            ]
            arrays[row.param] = np.stack(parts) if row.stacked else _contiguous(parts[0])
    return arrays


def export_state_dict(layout: Layout, arrays: Arrays, patch: int) -> Arrays:
    """Arrays by their names; takes ours out of `arrays`, all that the layout has a place for."""
    tensors = {}
    for row in layout.rows:
        if row.param in arrays:
            array = arrays.pop(row.param)
            parts = array if row.stacked else [array]
            for names, part in zip(row.names(len(parts)), parts):
                inverted = [_contiguous(x) for x in row.from_param(part, patch)]
                tensors |= dict(zip(names, inverted))
    return tensors


def select_layout(dialect: str, names: Iterable[str]) -> Layout:
    """The dialect's first layout with a place for all names, else the one with most places."""
    names = set(names)
    layouts = [layout for layout in LAYOUTS if layout.dialect == dialect]
    return max(layouts, key=lambda layout: len(names & {row.param for row in layout.rows}))
