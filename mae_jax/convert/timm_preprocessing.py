"""Parse pretrained_cfg in config.json of timm, which says how a model's images are prepared."""

import math
from typing import Any

from mae_jax.convert.model_info import INTERPOLATIONS, ConvertError, is_number

Json = dict[str, Any]

# The rule of `mae_jax.convert.preprocessing` for each crop_mode.
_CROP_MODES = {"center": "crop", "squash": "squash", "border": "border"}


def parse_timm_preprocessing(pretrained_cfg: Json, model_args: Json) -> Json:
    """Return the fields of a `ModelInfo` in pretrained_cfg; missing ones have timm's defaults.

    Raises:
      ConvertError: a setting is invalid or cannot be honored, or contradicts model_args.
    """
    config = {name: value for name, value in pretrained_cfg.items() if value}
    mode, interpolation = config.get("crop_mode", "center"), config.get("interpolation", "bicubic")
    for name, value, known in (
        ("crop_mode", mode, tuple(_CROP_MODES)),
        ("interpolation", interpolation, INTERPOLATIONS),
    ):
        check_value(f"pretrained_cfg.{name}", value, value in known, f"one of {', '.join(known)}")
    crop = config.get("crop_pct", 0.875)
    valid = is_number(crop) and 0 < crop <= 1
    check_value("pretrained_cfg.crop_pct", crop, valid, "a number above 0 and at most 1")
    fields: Json = {
        "resize": _CROP_MODES[mode],
        "crop": float(crop),
        "interpolation": interpolation,
    }
    channels, *size = _input_size(config, model_args)
    if size:
        fields["image_size"] = tuple(size)
    if mode == "center" and len(set(size)) == 2:
        fields["resize"] = "cover"
    for name, low in (("mean", -math.inf), ("std", 0)):
        if name in config:
            fields[name] = _stats(name, config[name], low, channels)
    return fields


def _input_size(config: Json, model_args: Json) -> list[int]:
    """Return channels, height and width of images, or only the channels.

    Raises:
      ConvertError: pretrained_cfg contradicts model_args, as in no file that timm writes.
    """
    size, input_size = model_args.get("img_size"), config.get("input_size")
    size = [size, size] if isinstance(size, int) else size
    if size is not None:
        check_value("model_args.img_size", size, _is_size(size, 2), "height and width")
    if input_size is None:
        return [model_args.get("in_chans", 3), *(size or [])]
    expected = "channels, height and width"
    check_value("pretrained_cfg.input_size", input_size, _is_size(input_size, 3), expected)
    model_size = [model_args.get("in_chans", input_size[0]), *(size or input_size[1:])]
    expected = f"{model_size}, as model_args says"
    check_value("pretrained_cfg.input_size", input_size, input_size == model_size, expected)
    return input_size


def _is_size(value: Any, length: int) -> bool:
    is_list = isinstance(value, list) and len(value) == length
    return is_list and all(type(number) is int and number > 0 for number in value)


def _stats(name: str, values: Any, low: float, channels: int) -> tuple[float, ...]:
    """Return mean or std by channel; a single number is that of all channels."""
    valid = isinstance(values, list) and len(values) in (1, channels)
    valid = valid and all(is_number(x) and x > low for x in values)
    expected = f"{channels} finite numbers{' above 0' if low == 0 else ''}, one per channel"
    check_value(f"pretrained_cfg.{name}", values, valid, expected)
    return tuple(values) * (channels if len(values) == 1 else 1)


def check_value(name: str, value: Any, valid: bool, expected: str) -> None:
    """Raise ConvertError, which names a setting, unless its value is valid."""
    if not valid:
        raise ConvertError(f"config.json: {name}={value!r} must be {expected}")
