"""Images with a mask each: the class number of every pixel, for semantic segmentation."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image, UnidentifiedImageError

from mae_jax.data.decode import NUMPY, Encoded, decode_numpy, open_image
from mae_jax.data.factory import DatasetSpec, detect_dataset
from mae_jax.data.file_kinds import why_not_an_image
from mae_jax.data.in_memory import ArraySource, load_arrays
from mae_jax.data.sources import DataError, FolderSource, Record, Source, hash_lines
from mae_jax.data.subsets import Subset, evenly_spaced

CLASS_NAMES = "classes.txt"  # one name per line, from class 0 on, beside the splits
MAX_LISTED = 5  # files without partner in an error
LAYOUT = (
    "segmentation needs DIR/SPLIT/images and DIR/SPLIT/masks with files of the same names, "
    "DIR/SPLIT.npz with the arrays image and mask, or a TFDS dataset with --mask-feature"
)

Mask = Int[np.ndarray, "h w"]


@dataclass(frozen=True)
class SegmentationSource:
    """A split of images with masks.

    Args:
      images: encoded images, or pixels.
      masks: encoded masks, or class numbers [height, width, 1], by the index of the image.
      class_names: may be empty.
      ignore: class number of pixels that do not count.
    """

    images: Source
    masks: Source
    class_names: tuple[str, ...]
    ignore: int

    classes: tuple[str, ...] = field(default=(), init=False)  # images have no labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        record = self.images[index]
        return {"image": record["image"], "label": -1, "mask": self.masks[index]["image"]}

    def label(self, index: int) -> int:
        return -1

    def describe(self, index: int) -> str:
        return self.images.describe(index)

    def fingerprint(self) -> str:
        return hash_lines([self.images.fingerprint(), self.masks.fingerprint()])

    def evenly_spaced(self, count: int) -> "SegmentationSource":
        """Return `count` evenly spaced images with their masks, or all if there are fewer."""
        images, masks = (evenly_spaced(source, count) for source in (self.images, self.masks))
        return dataclasses.replace(self, images=images, masks=masks)

    def mask(self, index: int) -> Mask:
        """Return the class numbers of an image.

        Raises:
          DataError: the mask cannot be read; names its file.
        """
        try:
            return decode_mask(self.masks[index]["image"])
        except DataError as error:
            raise DataError(f"{self.masks.describe(index)} is bad: {error}") from error


def decode_mask(encoded: Encoded) -> Mask:
    """Return the class numbers of a mask: PNG (palettes by index), TIFF or .npy.

    Raises:
      DataError: it is a JPEG, has colors instead of numbers, or cannot be decoded.
    """
    try:
        array = _decode(encoded)
    except DataError:
        raise
    except UnidentifiedImageError:
        assert isinstance(encoded, bytes)
        raise DataError(why_not_an_image(encoded)) from None
    except Exception as error:  # decoders raise all kinds of errors for corrupt bytes
        raise DataError(str(error) or type(error).__name__) from error
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]  # numbers saved as gray RGB
    if array.ndim != 2:
        raise DataError(
            f"its shape is {list(array.shape)}, but a mask has one class number per pixel: save "
            "colors as a palette PNG, or as their class numbers"
        )
    if array.dtype.kind not in "iub":
        raise DataError(f"its dtype is {array.dtype}, but class numbers are integers")
    if array.size and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31:
        raise DataError(f"it has numbers from {array.min()} to {array.max()}, which are no classes")
    return array.astype(np.int32)


def _decode(encoded: Encoded) -> np.ndarray:
    if isinstance(encoded, np.ndarray):
        return encoded
    if encoded.startswith(NUMPY):
        return decode_numpy(encoded)
    with open_image(encoded) as image:
        if image.format in ("JPEG", "WEBP", "AVIF", "JPEG2000"):
            raise DataError(f"it is a {image.format}, which can change numbers: save masks as PNG")
        return np.asarray(image)


def resize_mask(
    mask: Mask, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Mask:
    """Resize class numbers to height and width by nearest neighbor, at the pixels' centers.

    Args:
      box: as in `resize`.
    """
    resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST, box)
    return np.asarray(resized)


def open_segmentation(
    data: str,
    split: str,
    *,
    data_dir: str | None = None,
    image_feature: str = "image",
    mask_feature: str = "segmentation_mask",
    ignore: int = 255,
) -> SegmentationSource:
    """Open a split of a folder, or of a TFDS dataset.

    Args:
      data, data_dir, image_feature: as in `detect_dataset`.
      mask_feature: name of the mask feature of a TFDS dataset.

    Raises:
      DataError: it does not exist or has another layout, or an image or a mask is missing.
    """
    if not Path(data).exists():
        spec = detect_dataset(data, data_dir, image_feature)
        return open_tfds_masks(spec, split, mask_feature, ignore)
    return open_folder_masks(Path(data), split, ignore)


def open_tfds_masks(
    spec: DatasetSpec, split: str, mask_feature: str, ignore: int
) -> SegmentationSource:
    """Open a split of a TFDS dataset; arguments and errors as in `open_segmentation`."""
    images = spec.open(split)
    try:
        masks = dataclasses.replace(spec, image_feature=mask_feature).open(split)
    except DataError as error:
        if error.key != "data.image_feature":
            raise
        raise DataError(error.problem, key="segment.mask_feature", value=mask_feature) from error
    return SegmentationSource(images, masks, getattr(masks, "pixel_classes", ()), ignore)


def open_folder_masks(folder: Path, split: str, ignore: int) -> SegmentationSource:
    """Open a split of a folder; arguments and errors as in `open_segmentation`."""
    if (folder / f"{split}.npz").exists():
        return _open_arrays(folder / f"{split}.npz", ignore)
    source, unmatched = match_folders(folder, split, ignore)
    if unmatched:
        problems = [f"{file} {problem}" for file, problem in unmatched.items()]
        more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise DataError("; ".join(problems[:MAX_LISTED]) + more)
    return source


def has_masks(data: str, split: str) -> bool:
    """Return whether a split of a folder has masks."""
    folder = Path(data)
    if (folder / f"{split}.npz").exists():
        return "mask" in load_arrays(folder / f"{split}.npz", ("mask",))
    return (folder / split / "images").is_dir() and (folder / split / "masks").is_dir()


def match_folders(
    folder: Path, split: str, ignore: int
) -> tuple[SegmentationSource, dict[str, str]]:
    """Match images with masks of the same name, apart from its suffix.

    Returns:
      The pairs, and what is wrong with the other files.

    Raises:
      DataError: the folder has another layout.
    """
    root = folder / split
    if not has_masks(str(folder), split):
        problem = "has no folders images and masks" if root.is_dir() else "does not exist"
        raise DataError(f"{root} {problem}: {LAYOUT}")
    images, masks = (FolderSource(str(root / name), "") for name in ("images", "masks"))
    index_of_mask: dict[str, int] = {}
    unmatched: dict[str, str] = {}
    pairs: dict[str, int] = {}
    for index, file in enumerate(masks.files):
        other = index_of_mask.setdefault(os.path.splitext(file)[0], index)
        if other != index:
            unmatched[masks.describe(index)] = f"has the same name as {masks.describe(other)}"
    for index, file in enumerate(images.files):
        name = os.path.splitext(file)[0]
        if name not in index_of_mask:
            unmatched[images.describe(index)] = "has no mask"
        elif name in pairs:
            unmatched[images.describe(index)] = f"has the mask of {images.describe(pairs[name])}"
        else:
            pairs[name] = index
    for name, index in index_of_mask.items():
        if name not in pairs:
            unmatched[masks.describe(index)] = "has no image"
    source = SegmentationSource(
        Subset(images, list(pairs.values())),
        Subset(masks, [index_of_mask[name] for name in pairs]),
        _read_class_names(folder),
        ignore,
    )
    return source, unmatched


def _open_arrays(file: Path, ignore: int) -> SegmentationSource:
    arrays = load_arrays(file, ("image", "mask", "classes"))
    for name, dimensions in (("image", (3, 4)), ("mask", (3, 4))):
        if name not in arrays or arrays[name].ndim not in dimensions:
            problem = f"has shape {list(arrays[name].shape)}" if name in arrays else "is missing"
            raise DataError(f"{file}: the array {name!r} {problem}: {LAYOUT}")
    images, masks = arrays["image"], arrays["mask"]
    if len(images) != len(masks):
        raise DataError(f"{file} has {len(images)} images, but {len(masks)} masks")
    names = tuple(str(name) for name in arrays.get("classes", ()))
    _check_distinct(names, file)
    return SegmentationSource(
        ArraySource(str(file), images), ArraySource(f"the masks of {file}", masks), names, ignore
    )


def _read_class_names(folder: Path) -> tuple[str, ...]:
    file = folder / CLASS_NAMES
    if not file.exists():
        return ()
    try:
        names = tuple(line.strip() for line in file.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not names or not all(names):
        raise DataError(f"{file} must have one class name per line, without empty lines")
    _check_distinct(names, file)
    return names


def _check_distinct(names: tuple[str, ...], file: Path) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            first = names.index(name)
            raise DataError(f"{file} calls both class {first} and class {number} {name!r}")
