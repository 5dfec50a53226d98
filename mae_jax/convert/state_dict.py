"""Import state dicts into our parameters and export them, by the key maps of a layout."""

from collections.abc import Iterable, Mapping

import numpy as np

from mae_jax.convert.key_maps import DIALECTS, LAYOUTS, Layout
from mae_jax.convert.model_info import ConvertError
from mae_jax.utils.pytree import diff
from mae_jax.utils.sides import Sides

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


def detect_layout(
    names: Iterable[str], dialect: str | None, where: str, *, pixio: bool = False
) -> Layout:
    """Return the layout that matches most of the keys of a state dict.

    Args:
      dialect: the expected format; None detects it.
      where: the file, for messages.
      pixio: choose the layout of Pixio among those that match as many keys.

    Raises:
      ConvertError: no format matches, or another than the expected one.
    """
    if dialect not in (None, *DIALECTS):
        raise ConvertError(f"must be one of {', '.join(DIALECTS)}", key="dialect", value=dialect)
    names = list(names)
    matches = {layout: sum(layout.match(name) is not None for name in names) for layout in LAYOUTS}
    score = lambda layout: (matches[layout], layout.pixio == pixio)
    best = max(LAYOUTS, key=score)
    if matches[best] < max(len(names) / 4, 4):
        shown = ", ".join(sorted(names)[:6]) or "none"
        raise ConvertError(
            f"{where} is not an MAE or ViT in a supported format ({', '.join(DIALECTS)}); "
            f"its {len(names)} tensors are {shown}{', ...' if len(names) > 6 else ''}"
        )
    if dialect is None:
        return best
    expected = max((o for o in LAYOUTS if o.dialect == dialect), key=score)
    if matches[expected] < matches[best] / 2:
        raise ConvertError(f"{where} is not in the format {dialect}: its keys are those of {best}")
    return expected


def find_mismatches(
    layout: Layout, shapes: Shapes, tensors: Mapping[str, np.ndarray], patch: Sides
) -> list[str]:
    """Return a line for every missing or unexpected tensor, or wrong shape or dtype.

    Args:
      shapes: of our parameters.
      tensors: the state dict.
    """
    expected, mixed = {}, []
    for key_map in layout.key_maps:
        if key_map.param in shapes:
            shape = shapes[key_map.param]
            zeros = np.broadcast_to(np.float32(0), shape[1:] if key_map.stacked else shape)
            blocks = key_map.external_names(shape[0] if shape else 0)
            for names in blocks:
                expected |= dict(zip(names, key_map.from_param(zeros, patch)))
            mixed += _mixed_dtypes([name for names in blocks for name in names], tensors)
    return diff(expected, tensors) + mixed


def _mixed_dtypes(names: list[str], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Return a line for every tensor of one parameter whose dtype differs from the first one's.

    Stacking them would convert, so the round trip would not be byte-identical.
    """
    dtypes = {name: tensors[name].dtype for name in names if name in tensors}
    first = next(iter(dtypes), "")
    return [
        f"! {name} is {dtype}, but {first} is {dtypes[first]}: use one dtype for all blocks"
        for name, dtype in dtypes.items()
        if dtype != dtypes[first]
    ]


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, order="C")  # np.ascontiguousarray would give scalars an axis


def import_state_dict(layout: Layout, shapes: Shapes, tensors: Arrays) -> Arrays:
    """Return our parameters by path; removes the tensors used, to hold each in memory once."""
    arrays = {}
    for key_map in layout.key_maps:
        if key_map.param in shapes:
            depth = shapes[key_map.param][0] if key_map.stacked else 0
            blocks = [
                key_map.to_param(*[tensors.pop(name) for name in names])
                for names in key_map.external_names(depth)
            ]
            stacked = np.stack(blocks) if key_map.stacked else _contiguous(blocks[0])
            arrays[key_map.param] = stacked
    return arrays


def export_state_dict(layout: Layout, arrays: Arrays, patch: Sides) -> Arrays:
    """Return the state dict; removes the parameters used, all that the layout has keys for."""
    tensors = {}
    for key_map in layout.key_maps:
        if key_map.param in arrays:
            array = arrays.pop(key_map.param)
            blocks = array if key_map.stacked else [array]
            for names, block in zip(key_map.external_names(len(blocks)), blocks):
                external = [_contiguous(x) for x in key_map.from_param(block, patch)]
                tensors |= dict(zip(names, external))
    return tensors


def select_layout(dialect: str, names: Iterable[str], *, pixio: bool = False) -> Layout:
    """Return the format's first layout that covers all parameters, else the one with most.

    Args:
      pixio: choose among the layouts of Pixio's models, if the format has any.
    """
    names = set(names)
    layouts = [layout for layout in LAYOUTS if layout.dialect == dialect]
    layouts = [layout for layout in layouts if layout.pixio == pixio] or layouts
    return max(layouts, key=lambda layout: len(names & {k.param for k in layout.key_maps}))
