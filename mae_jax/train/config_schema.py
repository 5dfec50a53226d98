"""Typed config keys: declaration, validation, and conversion to and from a ConfigDict."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict, config_dict

from mae_jax.convert.locate import checkpoint_text
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path
from mae_jax.utils.sides import Sides, height_width, simplify

INF = math.inf
INT_OR_TUPLE = int | tuple  # type of a key of `Sides` in a ConfigDict


def key(
    default: Any,
    meaning: str,
    *,
    low: float = -INF,
    above: float = -INF,
    high: float = INF,
    below: float = INF,
    choices: tuple[str, ...] = (),
    resumable: bool = False,
    reshapes: bool = False,
    implied: Any = None,
    path: bool = False,
    remote: bool = False,
    checkpoint: bool = False,
) -> Any:
    """Declare a config key. Bounds hold for numbers, and for each element of a tuple.

    What depends on other values is checked where these are known: mask.ratio, for example, by the
    objective, since its bounds depend on the patch grid.

    Args:
      low, high: inclusive bounds; above, below: exclusive bounds.
      choices: the allowed strings, of each element of a tuple.
      resumable: a resumed run may change it, because the result does not depend on it.
      reshapes: its change alters the shapes of arrays, which no checkpoint can fill.
      implied: value that checkpoints of earlier versions imply, which lack the key.
      path: it is a file or folder, where "~" is expanded and gs:// and the like are refused.
      remote: it is such a path, or the address of an object store, as s3://bucket/folder.
      checkpoint: it names a checkpoint: such a path, an official file, or a model of the hub.
    """
    bounds = {"low": low, "above": above, "high": high, "below": below}
    metadata = {"meaning": meaning, "bounds": bounds, "choices": choices}
    metadata |= {"resumable": resumable, "reshapes": reshapes, "implied": implied}
    metadata |= {"path": path, "remote": remote, "checkpoint": checkpoint}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Group:
    """Config keys with a common prefix, which check themselves when constructed."""

    prefix: ClassVar[str] = ""
    resumable: ClassVar[bool] = False  # of all keys of the group

    def __post_init__(self):
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, value = f"{self.prefix}{field.name}", getattr(self, field.name)
            if field.metadata:
                _check(name, value, field, hints)
            elif not isinstance(value, hints[field.name]):
                raise UserError("must be a group of keys", key=name, value=value)

    def error(self, name: str, problem: str) -> UserError:
        """Return the error of a key of this group."""
        return UserError(problem, key=f"{self.prefix}{name}", value=getattr(self, name))


G = TypeVar("G", bound=Group)


def _check(name: str, value: Any, field: dataclasses.Field, hints: dict[str, Any]) -> None:
    """Raise UserError unless a value has the declared type and lies within the bounds."""
    hint, metadata = hints[field.name], field.metadata
    if value is None and type(None) in get_args(hint):
        return
    kind, elements, default = _scalar_type(hint), (value,), cast(Any, field.default)
    if hint == Sides and isinstance(value, tuple):
        hint, default = tuple[int, int], height_width(default)
    if get_origin(hint) is tuple:
        elements = value if isinstance(value, tuple) else ()
        length = None if ... in get_args(hint) else len(get_args(hint))
        if not elements or length not in (None, len(elements)):
            unit = "names" if kind is str else "numbers"
            count = f"{length} {unit}" if length else f"a tuple of {unit}"
            raise UserError(f"must be {count}, as in {default}", key=name, value=value)
    example = kind(1) if default is None else default
    for element in elements:
        if metadata["choices"] and element not in metadata["choices"]:
            choices = ", ".join(metadata["choices"])
            raise UserError(f"must be one of {choices}", key=name, value=element)
        if type(element) is not kind:
            problem = f"must be of type {kind.__name__}, as in {example!r}"
            raise UserError(problem, key=name, value=value)
        if isinstance(element, int | float) and not _within(element, **metadata["bounds"]):
            raise UserError(f"must be {_bounds_text(metadata['bounds'])}", key=name, value=value)


def _scalar_type(hint: Any) -> type:
    """Return int of `int`, `int | None`, `tuple[int, int]`, `tuple[int, ...]` and `Sides`."""
    args = [arg for arg in get_args(hint) if arg not in (type(None), ...)]
    return _scalar_type(args[0]) if args else hint


def _within(value: float, *, low: float, above: float, high: float, below: float) -> bool:
    """Return False for NaN, and for infinity if there is a bound."""
    inside = low <= value <= high and (above < value or above == -INF)
    inside = inside and (value < below or below == INF)
    bounded = (low, above, high, below) != (-INF, -INF, INF, INF)
    return inside and not (bounded and math.isinf(value))


def _bounds_text(bounds: dict[str, float]) -> str:
    """Return "at least 0 and below 1", "from 0 to 1" or "a finite number"."""
    low, high = bounds["low"], bounds["high"]
    if math.isfinite(low) and math.isfinite(high):
        return f"from {low} to {high}"
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    given = [f"{words[name]} {bound}" for name, bound in bounds.items() if math.isfinite(bound)]
    text = " and ".join(given)
    return f"{text}, and finite" if len(given) == 1 else text or "a finite number"


def declared_keys(group: Group) -> dict[str, Mapping[str, Any]]:
    """Return the metadata of all keys by name, as in "mask.ratio"."""
    keys: dict[str, Mapping[str, Any]] = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Group):
            keys |= declared_keys(value)
        else:
            resumable = group.resumable or field.metadata["resumable"]
            keys[f"{group.prefix}{field.name}"] = {**field.metadata, "resumable": resumable}
    return keys


def to_config_dict(group: Group) -> ConfigDict:
    """Return a ConfigDict of all keys; optional ones without a value become placeholders."""
    result, hints = ConfigDict(), get_type_hints(type(group))
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Group):
            value = to_config_dict(value)
        elif value is None:
            value = config_dict.placeholder(_scalar_type(hints[field.name]))
        elif hints[field.name] == Sides:
            value = config_dict.FieldReference(value, field_type=INT_OR_TUPLE)
        result[field.name] = value
    return result


def group_from_dict(group: type[G], values: dict[str, Any]) -> G:
    """Return a group of keys with the values of a nested dict.

    Raises:
      UserError: a key is unknown, or a value has the wrong type or is out of bounds.
    """
    arguments, hints = {}, get_type_hints(group)
    fields = {field.name: field for field in dataclasses.fields(group)}
    for name, value in values.items():
        if name not in hints:
            raise UserError("is not a config key", key=f"{group.prefix}{name}", value=value)
        if isinstance(value, dict) and isinstance(hints[name], type):
            value = group_from_dict(hints[name], value)
        elif _scalar_type(hints[name]) is float:  # as in crop_scale=(0, 1)
            value = _as_float(value)
        elif isinstance(value, str):
            value = _expand(f"{group.prefix}{name}", value, fields[name].metadata)
        value = tuple(value) if isinstance(value, list) else value
        if hints[name] == Sides and isinstance(value, tuple) and len(value) == 2:
            value = simplify(*value)
        arguments[name] = value
    return group(**arguments)


def _expand(name: str, text: str, metadata: Mapping[str, Any]) -> str:
    """Expand the value of a key that is a path or names a checkpoint."""
    try:
        if metadata["checkpoint"]:
            return checkpoint_text(text)
        is_path = metadata["path"] or metadata["remote"]
        return expand_path(text, remote=metadata["remote"]) if is_path else text
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _as_float(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_as_float(element) for element in value)
    return float(value) if type(value) is int else value


def as_json(group: Group) -> dict[str, Any]:
    """Return the nested dict of values that config.json and checkpoints hold."""
    return _json_value(dataclasses.asdict(group))


def _json_value(value: Any) -> Any:
    """Return a value as JSON would read it back: sorted, with lists for tuples."""
    if isinstance(value, dict):
        return {name: _json_value(value[name]) for name in sorted(value)}
    return list(value) if isinstance(value, tuple) else value
