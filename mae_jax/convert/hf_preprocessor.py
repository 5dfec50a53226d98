"""Parse and write preprocessor_config.json of Hugging Face, the settings of an image processor."""

import re
from typing import Any, NoReturn

import numpy as np

from mae_jax.convert import preprocessing
from mae_jax.convert.model_info import INTERPOLATIONS, ConvertError, ModelInfo, is_number

Json = dict[str, Any]
FILE = "preprocessor_config.json"

# Defaults of the classes of image processors that do no more than the steps below.
_SQUARE = {"height": 224, "width": 224}
_HALF = {"image_mean": 0.5, "image_std": 0.5}
_CLIP = {
    "resample": 3,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "do_convert_rgb": True,
}
_CLASSES: dict[str, Json] = {
    "ViT": {"resample": 2, **_HALF},  # size: that of the model
    "DeiT": {
        "resample": 3,
        **_HALF,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": _SQUARE,
    },
    "Beit": {"resample": 3, **_HALF, "size": _SQUARE, "crop_size": _SQUARE},
    "Siglip": {
        "resample": 3,
        **_HALF,
        "size": _SQUARE,
        "default_to_square": False,
        "do_convert_rgb": True,
    },
    "CLIP": _CLIP,
    "Bit": _CLIP,
}
_DEFAULTS: Json = {
    "do_resize": True,
    "default_to_square": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": False,
}
_IGNORED = {"do_reduce_labels"}  # of segmentation maps


def _refuse(problem: str) -> NoReturn:
    raise ConvertError(
        f"preprocessor_config.json: {problem}. Correct the file; without it, full images are "
        "resized (bilinear) and normalized with ImageNet's mean and std"
    )


def parse_hf_preprocessor(
    file: Json, channels: int, image_size: tuple[int, int], name: str = FILE
) -> Json:
    """Return the fields of a `ModelInfo` that preprocessor_config.json determines.

    Missing settings have the defaults of transformers' class; null is no default, but none.

    Args:
      channels, image_size: as in config.json.
      name: of the file, for errors.

    Raises:
      ConvertError: a setting is invalid, or cannot be honored; it is named.
    """
    try:
        return _parse(file, channels, image_size)
    except ConvertError as error:
        raise ConvertError(str(error).replace(FILE, name, 1)) from error


def _parse(file: Json, channels: int, image_size: tuple[int, int]) -> Json:
    settings = _with_defaults(file)
    unknown = {name for name in settings if name.startswith("do_")} - _DEFAULTS.keys() - _IGNORED
    for name in sorted(unknown):
        if settings[name]:
            _refuse(f"{name}={settings[name]!r} is not supported")
    if settings["do_convert_rgb"] and channels != 3:
        _refuse(f"do_convert_rgb is true, but num_channels of config.json is {channels}")
    if settings["resample"] not in range(len(INTERPOLATIONS)):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(INTERPOLATIONS))
        _refuse(f"resample={settings['resample']!r} must be one of {known}")
    return {
        "interpolation": INTERPOLATIONS[int(settings["resample"])],
        "alpha": "white" if settings["do_convert_rgb"] else "drop",
        **_parse_sizes(settings, image_size),
        **_parse_stats(settings, channels),
    }


def _with_defaults(file: Json) -> Json:
    """Return the settings, with the defaults of the file's class for missing ones."""
    name = file.get("image_processor_type") or file.get("feature_extractor_type") or "ViT"
    kind = re.sub("(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", str(name))
    if kind not in _CLASSES:
        supported = ", ".join(f"{kind}ImageProcessor" for kind in _CLASSES)
        _refuse(f"image_processor_type={name!r} is not supported, but {supported} are")
    return _DEFAULTS | _CLASSES[kind] | file


def _parse_sizes(settings: Json, image_size: tuple[int, int]) -> Json:
    """Return the rule of resizing and cropping."""
    size: Json = {}
    if settings["do_resize"]:
        default = {"height": image_size[0], "width": image_size[1]}
        size = _size_dict(settings, "size", default, settings["default_to_square"])
    crop_size = ()
    if settings["do_center_crop"]:
        crop = _size_dict(settings, "crop_size", None, square=True)
        if crop.keys() != {"height", "width"}:
            _refuse(f"crop_size={settings['crop_size']!r} must be height and width")
        crop_size = crop["height"], crop["width"]
    made = crop_size or (size.get("height"), size.get("width"))
    if made not in (image_size, (None, None)):
        _refuse(
            f"it makes images of {made[0]} x {made[1]} pixels, but image_size of config.json is "
            f"{image_size[0]} x {image_size[1]}; to use the model with another size than that of "
            "config.json, set --image-size"
        )
    if not crop_size and "height" in size:
        return {"resize": "squash", "crop": 1.0, "size": (), "crop_size": ()}
    return {
        "resize": "processor",
        "crop": 1.0,
        "size": tuple(size.items()),
        "crop_size": crop_size,
    }


def _size_dict(settings: Json, name: str, default: Json | None, square: bool) -> dict[str, int]:
    """Return `size` or `crop_size` as a dict of pixels, in the order of `SIZE_KEYS`."""
    value = settings.get(name, default)
    size: Any = value
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif isinstance(size, dict):
        size = {key: pixels for key, pixels in sorted(size.items()) if pixels is not None}
    if not isinstance(size, dict) or size.keys() not in preprocessing.SIZE_KEYS:
        _refuse(
            f"{name}={value!r} must be a number of pixels, or one of the sets of keys "
            + ", ".join("/".join(sorted(keys)) for keys in preprocessing.SIZE_KEYS)
        )
    if not all(type(pixels) is int and pixels > 0 for pixels in size.values()):
        _refuse(f"{name}={value!r} must be whole numbers of pixels above 0")
    return size


def _parse_stats(settings: Json, channels: int) -> Json:
    """Return mean and std, and the images that they are for.

    transformers computes (value * rescale_factor - image_mean) / image_std for every dtype.
    """
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1
    if not is_number(factor) or factor <= 0:
        _refuse(f"rescale_factor={factor!r} must be a finite number above 0")
    mean, std = (0.0,) * channels, (1.0,) * channels
    if settings["do_normalize"]:
        mean, std = (_numbers(settings, name, channels) for name in ("image_mean", "image_std"))
    scale = 255 * factor  # exactly 1 for 1/255
    if all(0 <= x / scale <= 1 for x in mean):
        pixels = "any" if factor == 1 else "uint8"
    else:
        pixels, scale = "other", factor
    mean, std = (tuple(x / scale for x in values) for values in (mean, std))
    return {"mean": mean, "std": std, "pixels": pixels}


def _numbers(settings: Json, name: str, channels: int) -> tuple[float, ...]:
    value = settings[name]
    values = (value,) * channels if is_number(value) else value
    if not isinstance(values, (list, tuple)) or not all(map(is_number, values)):
        _refuse(f"{name}={value!r} must be one finite number, or one per channel")
    if len(values) != channels:
        _refuse(f"{name} has {len(values)} numbers for {channels} channels of config.json")
    if name == "image_std" and min(values) <= 0:
        _refuse(f"image_std={value!r} must be above 0")
    return tuple(values)


def processor_resizes(info: ModelInfo) -> bool:
    """Return whether transformers can resize images for a model.

    On Pillow it resizes gray and RGB images of 8 bits; of others the values would be lost.
    """
    return info.channels in (1, 3) and _is_8_bit(info)


def _is_8_bit(info: ModelInfo) -> bool:
    if info.bit_depth is not None:
        return False
    by_mean = all(0 <= x <= 1 for x in info.mean)
    return info.pixels in ("uint8", "any") or (info.pixels == "unknown" and by_mean)


def _rescale_factor(info: ModelInfo) -> float:
    """Return the factor of pixel values before mean and std are applied."""
    if info.bit_depth is not None:
        return 1 / (2**info.bit_depth - 1)
    return 1 / 255 if _is_8_bit(info) and info.pixels != "any" else 1.0


def hf_preprocessor(info: ModelInfo) -> Json:
    """Return preprocessor_config.json, for versions 4 and 5 of transformers.

    The ViT processor of version 4 has no center crop, but the one of BiT has the same steps.
    """
    size, crop_size = preprocessing.as_processor(info) or _full_image(info)
    resizes = processor_resizes(info)
    if not resizes:
        size, crop_size = {}, ()
    factor = _rescale_factor(info)
    mean, std = (info.mean, info.std) if factor != 1 else info.stats(np.float32)
    shortest = "height" not in size and bool(size)
    content: Json = {
        "image_processor_type": f"{'Bit' if crop_size or shortest else 'ViT'}ImageProcessor",
        "do_center_crop": bool(crop_size),
        "do_convert_rgb": info.alpha == "white",
        "do_normalize": True,
        "do_rescale": factor != 1,
        "do_resize": bool(size),
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": INTERPOLATIONS.index(info.interpolation),
        "rescale_factor": factor,
        "size": size or {"height": info.image_size[0], "width": info.image_size[1]},
    }
    if crop_size:
        content["crop_size"] = {"height": crop_size[0], "width": crop_size[1]}
    return content


def _full_image(info: ModelInfo) -> tuple[dict[str, int], tuple[int, ...]]:
    return {"height": info.image_size[0], "width": info.image_size[1]}, ()
