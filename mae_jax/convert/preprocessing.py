"""Resize, crop and pad images as the program does that a checkpoint comes from.

`ModelInfo.resize` is one of these rules:

- "crop": the shorter side becomes side / crop, then the center is cropped (torchvision).
- "squash": height and width become image_size / crop each, then the center is cropped (timm).
- "cover": the image just covers image_size / crop, then the center is cropped (timm, not square).
- "border": it just fits into image_size / crop; the rest is filled with the mean (timm).
- "processor": `size` and `crop_size` of an image processor of transformers; empty if unused.

`ModelInfo.alpha`: transparent images lie on "white" in transformers, others "drop" transparency.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mae_jax.convert.model_info import ModelInfo
from mae_jax.data.decode import Encoded, Pixels, decode, open_image
from mae_jax.data.sources import DataError
from mae_jax.data.transforms import EvalTransform, Example, resize

SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


def make_transform(info: ModelInfo) -> "EvalTransform | ModelTransform":
    """Return the transform from an encoded image to an array for a model."""
    if info.resize != "crop":
        return ModelTransform(info)
    return EvalTransform(
        info.image_size,
        info.channels,
        info.crop,
        interpolation=info.interpolation,
        exif=info.exif,
        bit_depth=info.bit_depth,
        options=info.read_options,
    )


@dataclass(frozen=True)
class ModelTransform:
    """Preprocessing by any rule except "crop"."""

    info: ModelInfo

    def __call__(self, encoded: Encoded, rng: object = None) -> Example:
        """Return {"image": [h, w, c]}.

        Raises:
          DataError: the image is corrupt, or the result does not have the model's size.
        """
        info = self.info
        if info.alpha == "white" and info.channels == 3 and isinstance(encoded, bytes):
            encoded = _flatten_on_white(encoded)
        image = decode(encoded, info.channels, info.exif, info.bit_depth, info.read_options)
        size = resized_size(info, (image.shape[0], image.shape[1]))
        if 0 in size:
            raise DataError(f"its {image.shape[0]} x {image.shape[1]} pixels become {size}")
        image = resize(image, size, info.interpolation)
        is_processor = info.resize == "processor"
        crop_size = info.crop_size if is_processor else info.image_size
        if crop_size:
            fill = _border_color(info, image.dtype) if info.resize == "border" else [0]
            image = center_crop(image, crop_size, fill, round_down=is_processor)
        if image.shape[:2] != info.image_size:
            raise DataError(
                f"preprocessor_config.json makes it {image.shape[0]} x {image.shape[1]} pixels, "
                f"but the model takes {info.image_size[0]} x {info.image_size[1]}: set do_resize "
                "and size there, or do_center_crop and crop_size"
            )
        return {"image": image}


def _flatten_on_white(encoded: bytes) -> Encoded:
    """Return the pixels of a transparent image on white; other bytes unchanged."""
    try:
        with open_image(encoded) as image:
            if not image.has_transparency_data:
                return encoded
            white = Image.new("RGBA", image.size, "white")
            return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
    except Exception:  # Pillow raises all kinds of errors; `decode` says what is wrong
        return encoded


def _border_color(info: ModelInfo, dtype: np.dtype) -> np.ndarray:
    mean = np.array(info.stats(dtype)[0])
    return np.array([round(255 * x) for x in mean]) if dtype == np.uint8 else mean


def resized_size(info: ModelInfo, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image after resizing, before the crop."""
    height, width = size
    if info.resize == "processor":
        return _processor_size(dict(info.size), height, width)
    target_height, target_width = (math.floor(side / info.crop) for side in info.image_size)
    if info.resize == "squash":
        return target_height, target_width
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if info.resize == "border" else min(ratios)
    return round(height / ratio), round(width / ratio)


def _processor_size(size: dict[str, int], height: int, width: int) -> tuple[int, int]:
    """Return the result of `resize` of transformers' image processors, with its rounding."""
    if not size:
        return height, width
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    short, long = sorted((height, width))
    edge, limit = size["shortest_edge"], size.get("longest_edge", math.inf)
    unrounded: float = edge
    if long / short * edge > limit:
        unrounded = limit * short / long
        edge = round(unrounded)
    if "longest_edge" in size and short == edge:
        return height, width
    other = int(unrounded * long / short)
    return (other, edge) if width <= height else (edge, other)


def center_crop(
    image: Pixels, size: tuple[int, ...], fill: np.ndarray | list[int], *, round_down: bool
) -> Pixels:
    """Crop the center; a side that is too short is filled on both ends.

    Args:
      size: height and width; fill: value per channel.
      round_down: of an odd remainder, remove less at the start, and fill more there, as
        transformers (on Pillow); else round as torchvision.
    """
    starts, pads = [], []
    for full, side in zip(image.shape, size):
        spare, missing = max(full - side, 0), max(side - full, 0)
        starts.append(spare // 2 if round_down else round(spare / 2))
        pads.append(-(-missing // 2) if round_down else missing // 2)
    image = image[starts[0] : starts[0] + size[0], starts[1] : starts[1] + size[1]]
    if image.shape[:2] == size:
        return image
    canvas = np.empty((*size, image.shape[2]), image.dtype)
    canvas[:] = fill
    canvas[pads[0] : pads[0] + image.shape[0], pads[1] : pads[1] + image.shape[1]] = image
    return canvas


def with_image_size(info: ModelInfo, image_size: tuple[int, int]) -> ModelInfo:
    """Return the metadata for another image size; sizes in pixels change in proportion."""
    scales = [new / old for new, old in zip(image_size, info.image_size)]
    by_key = {"height": scales[0], "width": scales[1]}
    by_key |= {"max_height": scales[0], "max_width": scales[1]}
    size = tuple((k, round(value * by_key.get(k, max(scales)))) for k, value in info.size)
    crop_size = image_size if info.crop_size else ()
    return dataclasses.replace(info, image_size=image_size, size=size, crop_size=crop_size)


def as_processor(info: ModelInfo) -> tuple[dict[str, int], tuple[int, ...]] | None:
    """Return `size` and `crop_size` of a processor of transformers; None if none does the same.

    Of "crop", the offsets of an odd remainder differ by one pixel.
    """
    height, width = (math.floor(side / info.crop) for side in info.image_size)
    crop_size = info.image_size if info.crop < 1 else ()
    if info.resize == "processor":
        return dict(info.size), info.crop_size
    if info.resize == "squash":
        return {"height": height, "width": width}, crop_size
    if info.resize == "crop" and height == width:
        return {"shortest_edge": height}, info.image_size
    return None


def as_crop(info: ModelInfo) -> tuple[str, float] | None:
    """Return the rule and fraction of timm; None if none does the same."""
    if info.resize == "crop" and info.image_size[0] != info.image_size[1]:
        return "cover", info.crop
    if info.resize != "processor":
        return info.resize, info.crop
    size, cropped = dict(info.size), info.image_size
    if size.keys() == {"shortest_edge"} and info.crop_size and cropped[0] == cropped[1]:
        resized, rule = (size["shortest_edge"],) * 2, "crop"
    elif size.keys() == {"height", "width"}:
        resized, rule = (size["height"], size["width"]), "squash"
    else:
        return None
    fraction = cropped[0] / resized[0]
    if fraction > 1:
        return None
    if math.floor(cropped[0] / fraction) < resized[0]:  # rounded in the last bit
        fraction = math.nextafter(fraction, 0)
    matches = all(math.floor(c / fraction) == r for c, r in zip(cropped, resized))
    return (rule, fraction) if matches else None
