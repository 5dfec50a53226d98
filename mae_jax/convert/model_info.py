"""Metadata of a checkpoint."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_jax.data.read_options import ReadOptions
from mae_jax.models.classifier import POOLS
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD, stats_match_dtype
from mae_jax.models.patches import patch_grid
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides, height_width, sides_text, simplify

TARGETS = ("pixels", "normalized", "unknown")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's order


class ConvertError(UserError):
    """A checkpoint cannot be read, converted or written."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Architecture and preprocessing of a checkpoint.

    source: format that the weights originally came from.
    heads: 0 if unknown; decoder_depth: 0 without decoder; num_classes: 0 without head.
    class_tokens: number of learned tokens before those of the patches.
    image_size: height and width, pixels; patch: side of a patch, or its height and width.
    pool, fc_norm, head_norm, upsample_width: as in `Classifier`.
    target: what the decoder predicts: "pixels", "normalized" or "unknown".
    mask_ratio, mask_cell: fraction of cells hidden in pretraining, and their side in patches; the
      paper's if unknown.
    resize, crop, size, crop_size, alpha: see `mae_jax.convert.preprocessing`; interpolation: name
      of a filter of Pillow.
    mean, std: per channel, as in `mae_jax.models.image_ops`; exif: EXIF orientation is applied.
    bit_depth: as in `mae_jax.data.decode.decode`; nodata, bands, dicom_window: as in `ReadOptions`.
    pixels: which images mean and std are for: "uint8"; "other" dtypes; "any", fractions of 255 of
      every dtype; "unknown", by the values of the mean.
    problem_type: of the head, one of `PROBLEM_TYPES`; "" if unknown, see `problem`.
    """

    source: str
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    class_tokens: int = 1
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_heads: int = 0
    decoder_mlp_ratio: float = 4.0
    patch: Sides
    image_size: tuple[int, int]
    channels: int
    layer_norm_eps: float
    pool: str = "cls"
    fc_norm: bool = False
    head_norm: bool = False
    upsample_width: int = 0
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    target: str = "unknown"
    norm_pix_eps: float = 1e-6
    mask_ratio: float = 0.75
    mask_cell: int = 1
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "crop"
    crop: float = 0.875
    interpolation: str = "bicubic"
    exif: bool = False
    bit_depth: int | None = None
    nodata: str | None = None
    bands: str | None = None
    dicom_window: str | None = None
    size: tuple[tuple[str, int], ...] = ()
    crop_size: tuple[int, ...] = ()
    alpha: str = "drop"
    pixels: str = "unknown"
    problem_type: str = ""

    def __post_init__(self):
        """Raise ConvertError for invalid values."""
        types = (("source", str), ("fc_norm", bool), ("head_norm", bool), ("exif", bool))
        for name, expected in types:
            value = vars(self)[name]
            _check(name, value, isinstance(value, expected), f"a {expected.__name__}")
        counts = ("width", "depth", "channels", "class_tokens", "mask_cell")
        for name in (*counts, "heads", "num_classes", "upsample_width", *_DECODER):
            value = vars(self)[name]
            low = 1 if name in counts else 0
            _check(name, value, type(value) is int and value >= low, f"an integer >= {low}")
        is_side = lambda value: type(value) is int and value >= 1
        valid = is_side(self.patch)
        if isinstance(self.patch, tuple):
            valid = len({*self.patch}) == len(self.patch) == 2 and all(map(is_side, self.patch))
        _check("patch", self.patch, valid, "an integer >= 1, or two that differ, height and width")
        for name in ("mlp_ratio", "decoder_mlp_ratio", "layer_norm_eps", "crop"):
            value = vars(self)[name]
            valid = isinstance(value, (int, float)) and 0 < value < math.inf
            _check(name, value, valid, "a number > 0")
        _check("crop", self.crop, self.crop <= 1, "at most 1")
        valid = isinstance(self.norm_pix_eps, (int, float)) and 0 <= self.norm_pix_eps < math.inf
        _check("norm_pix_eps", self.norm_pix_eps, valid, "a number >= 0")
        valid = isinstance(self.mask_ratio, (int, float)) and 0 <= self.mask_ratio < 1
        _check("mask_ratio", self.mask_ratio, valid, "a number >= 0 and < 1")
        depths = (None, *range(1, 17))
        _check("bit_depth", self.bit_depth, self.bit_depth in depths, "None, or 1 to 16")
        for name in ("nodata", "bands", "dicom_window"):
            value = vars(self)[name]
            _check(name, value, isinstance(value, str | None), "text")
        assert self.read_options  # raises an error if its texts are invalid
        size = self.image_size
        valid = isinstance(size, tuple) and len(size) == 2 and all(type(n) is int for n in size)
        _check("image_size", size, valid, "height and width")
        for name, allowed in _CHOICES.items():
            _check(name, vars(self)[name], vars(self)[name] in allowed, f"one of {allowed}")
        for name, low in (("mean", -math.inf), ("std", 0)):
            values = vars(self)[name]
            valid = isinstance(values, tuple) and len(values) == self.channels
            valid = valid and all(
                isinstance(x, (int, float)) and low < x < math.inf for x in values
            )
            _check(name, values, valid, f"{self.channels} numbers, one per channel")
        if self.num_classes == 1:
            valid = self.problem_type != "single_label_classification"
            _check("problem_type", self.problem_type, valid, "another one for a single output")

    def stats(self, dtype: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std for `image_ops.normalize` of images of a dtype."""
        factor = 255 if self.pixels == "any" and dtype != np.uint8 else 1
        mean, std = (tuple(factor * x for x in values) for values in (self.mean, self.std))
        return mean, std

    def accepts(self, dtype: Any) -> bool:
        """Return whether mean and std can belong to images of a dtype."""
        if self.bit_depth is not None or self.nodata is not None:
            return dtype == np.float32  # fractions, or with NaN
        if self.pixels == "unknown" or dtype == np.uint8:
            return self.pixels != "other" and stats_match_dtype(dtype, self.mean)
        return self.pixels in ("other", "any")

    @property
    def read_options(self) -> ReadOptions:
        """Return how image files are read."""
        return ReadOptions(self.nodata, self.bands, self.dicom_window)

    @property
    def of_decoded(self) -> "ModelInfo":
        """Return the metadata for images that `decode` has read already."""
        return dataclasses.replace(self, **vars(self.read_options.of_decoded))

    @property
    def problem(self) -> str:
        """Return what the head predicts; one output is a regression, as in transformers."""
        if self.segments:
            return "semantic_segmentation"
        single = "regression" if self.num_classes == 1 else "single_label_classification"
        return self.problem_type or single

    @property
    def is_pixio(self) -> bool:
        """Return whether Pixio's code runs the model, and that of MAE does not, or need not."""
        return self.class_tokens > 1 or self.source == "pixio"

    @property
    def segments(self) -> bool:
        """Return whether the head classifies every patch."""
        return self.pool == "grid"

    @property
    def grid(self) -> tuple[int, int]:
        """Return the number of rows and columns of patches."""
        return patch_grid(self.image_size, self.patch)

    @property
    def size_name(self) -> str:
        """Return the name of the size in `VARIANTS`, or "custom"."""
        known = {(s.width, s.depth, s.patch): name for name, s in VARIANTS.items()}
        return known.get((self.width, self.depth, self.patch), "custom")

    def to_json(self) -> str:
        """Return one line of JSON, for the metadata of a file."""
        return json.dumps(dataclasses.asdict(self))


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


_DECODER = ("decoder_width", "decoder_depth", "decoder_heads")
_CHOICES = {
    "pool": (*POOLS, "grid"),
    "target": TARGETS,
    "resize": ("crop", "squash", "cover", "border", "processor"),
    "interpolation": INTERPOLATIONS,
    "alpha": ("drop", "white"),
    "pixels": ("unknown", "uint8", "other", "any"),
    "problem_type": ("", *PROBLEM_TYPES),
}


def _check(name: str, value: Any, valid: bool, expected: str) -> None:
    if not valid:
        raise ConvertError(f"must be {expected}", key=name, value=value)


FIELDS = {field.name: field for field in dataclasses.fields(ModelInfo)}
REQUIRED = {name for name, field in FIELDS.items() if field.default is dataclasses.MISSING}

# Defaults for metadata that files of a format lack. transformers' layer_norm_eps is 1e-12.
_COMMON: dict[str, Any] = dict(
    layer_norm_eps=1e-6,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    norm_pix_eps=1e-6,
    resize="crop",
    crop=0.875,
    interpolation="bicubic",
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "mae_jax": _COMMON,
    "official": _COMMON | dict(pool="cls"),
    "timm": _COMMON | dict(crop=0.9, pool="cls"),
    "hf": _COMMON | dict(layer_norm_eps=1e-12, resize="squash", crop=1.0, interpolation="bilinear"),
    # Images as its k-NN evaluation prepares them; those of transformers are squashed.
    "pixio": _COMMON | dict(crop=1.0, mask_cell=4),
    "hf_pixio": _COMMON | dict(resize="squash", crop=1.0, mask_cell=4),
}


def metadata_from_json(text: str, where: str) -> dict[str, Any]:
    """Parse `ModelInfo.to_json`; ignores unknown keys, such as those of later versions."""
    try:
        metadata = json.loads(text)
        metadata = {name: value for name, value in metadata.items() if name in FIELDS}
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConvertError(f"{where}: its mae_jax metadata is corrupt: {error}") from error
    return {name: _as_tuple(value) for name, value in metadata.items()}


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def expand_stats(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return means or deviations for another number of channels: averaged to one, else cyclic."""
    if channels == 1 and len(values) > 1:
        return (float(np.mean(values)),)
    return tuple(values[i % len(values)] for i in range(channels))


def check_reconstructs(info: ModelInfo, path: str, mask: str) -> None:
    """Raise ConvertError, with the remedy, unless a model reconstructs images under such masks.

    Args:
      path: of the checkpoint, for the message; mask: as in `Pretrain`.
    """
    if not info.decoder_depth:
        if info.is_pixio:
            raise ConvertError(
                f"{path} has no decoder, so it cannot reconstruct: the published files of Pixio "
                "are encoders. Use a run, or a checkpoint of its pretraining code"
            )
        names = {"vit_b16": "base", "vit_l16": "large", "vit_h14": "huge"}
        size = names.get(info.size_name, "base")
        raise ConvertError(
            f"{path} has no decoder, so it cannot reconstruct. Of the official files, "
            f"mae_pretrain_vit_{size}_full.pth (normalized pixels) and "
            f"mae_visualize_vit_{size}.pth (pixels) have one"
        )
    if info.target == "unknown":
        raise ConvertError(
            f"{path} does not record whether its decoder predicts pixels or normalized pixels: set "
            "--target pixels or normalized (in Python, target=)"
        )
    if not info.decoder_heads:
        raise ConvertError(
            f"{path} does not record the number of attention heads of its decoder: set "
            "--decoder-num-heads (in Python, decoder_heads=)"
        )
    if mask == "random" and any(side % info.mask_cell for side in info.grid):
        cell = simplify(*(info.mask_cell * side for side in height_width(info.patch)))
        raise ConvertError(
            f"the masks of {path} have cells of {info.mask_cell} x {info.mask_cell} patches, which "
            f"do not divide {info.grid[0]} x {info.grid[1]} patches: use --image-size with "
            f"multiples of {sides_text(cell)}, or --mask block"
        )
