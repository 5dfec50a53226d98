"""Decode images to arrays [height, width, channels], detecting corrupt files.

JPEGs are decoded by libjpeg-turbo (simplejpeg): bit-identical to Pillow, faster, and it detects
corruption that Pillow decodes to garbage. Other images are decoded by Pillow, multichannel ones by
tifffile and numpy.
"""

import io
import math
import re
from typing import Any

import numpy as np
import simplejpeg
import tifffile
from jaxtyping import Shaped
from PIL import Image, UnidentifiedImageError

from mae_jax.data.sources import DataError

Encoded = bytes | np.ndarray  # the bytes of a file, or an array that needs no decoding
Pixels = Shaped[np.ndarray, "h w c"]  # uint8 in 0..255; else uint16 or float32 in their own units

MODES = {1: "L", 3: "RGB"}
JPEG, NPY, ZIP = b"\xff\xd8\xff", b"\x93NUMPY", b"PK\x03\x04"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# libjpeg's messages about lost pixels; a few extraneous bytes before the end marker lose none.
CORRUPT = re.compile(r"Premature end|Corrupt JPEG data: (?!\d extraneous bytes before marker 0xd9)")
ORIENTATION = 0x0112  # EXIF tag


def decode(encoded: Encoded, channels: int, exif: bool = False) -> Pixels:
    """Decode an image: to gray or RGB for 1 or 3 channels, else to its own channels.

    As in the official code, alpha is dropped (with 1 or 3 channels), and the EXIF orientation is
    applied only with `exif`.

    Raises:
      DataError: the file is corrupt, not an image, or has another number of channels.
    """
    if isinstance(encoded, np.ndarray):
        return _to_pixels(encoded, channels)
    try:
        if encoded.startswith((NPY, ZIP)):
            return _to_pixels(_decode_numpy(encoded), channels)
        is_tiff = encoded.startswith(TIFF)
        if is_tiff and _is_multichannel(encoded, channels):
            return _to_pixels(_decode_multichannel_tiff(encoded), channels)
        array = _decode_jpeg(encoded, channels) if encoded.startswith(JPEG) else None
        if array is None:
            array = _decode_with_pillow(encoded, channels)
        # Pillow applies the orientation of a TIFF while loading it.
        return _apply_orientation(array, encoded) if exif and not is_tiff else array
    except DataError:
        raise
    except MemoryError:
        raise DataError("there is not enough memory to decode it") from None
    except UnidentifiedImageError:
        raise DataError(_why_not_an_image(encoded)) from None
    except Exception as error:  # decoders raise all kinds of errors for corrupt bytes
        raise DataError(str(error) or type(error).__name__) from error


def _why_not_an_image(encoded: bytes) -> str:
    if not encoded:
        return "it is empty"
    if encoded.lstrip()[:1] == b"<":
        return "it is a web page or other markup, not an image"
    return "its bytes are not an image"


def _decode_jpeg(encoded: bytes, channels: int) -> Pixels | None:
    """Return the pixels of a JPEG, or None if Pillow must decode or reject it."""
    try:
        header: Any = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # KeyError: no image follows the header
        return None
    height, width, color_space, _ = header
    is_bomb = height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if channels not in MODES or color_space in ("CMYK", "YCCK") or is_bomb:
        return None
    as_gray = channels == 1 and color_space == "Gray"
    try:
        array = simplejpeg.decode_jpeg(encoded, "GRAY" if as_gray else "RGB", strict=True)
    except ValueError as error:
        if CORRUPT.match(str(error)):
            raise
        return None  # a warning that does not imply lost pixels
    if channels == 1 and not as_gray:
        array = np.asarray(Image.fromarray(array).convert("L"))[..., None]
    return array


def _decode_with_pillow(encoded: bytes, channels: int) -> Pixels:
    with Image.open(io.BytesIO(encoded)) as image:
        if channels not in MODES:
            return _to_pixels(np.asarray(image), channels)
        array = np.asarray(_to_8_bit(image).convert(MODES[channels]))
        return array.reshape(*array.shape[:2], channels)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit values to 8 bits; Pillow's conversion would clip them at 255.

    Raises:
      ValueError: the values have 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image, np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 bits, or as .npy"
        )
    return image


def _apply_orientation(array: Pixels, encoded: bytes) -> Pixels:
    orientation = exif_orientation(encoded)
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def exif_orientation(encoded: bytes) -> int:
    """Return the EXIF orientation; 1 is upright."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.getexif().get(ORIENTATION, 1)


def _is_multichannel(encoded: bytes, channels: int) -> bool:
    """Return whether a TIFF has one page per channel, or another number of channels than 1 or 3."""
    if channels not in MODES:
        return True
    with Image.open(io.BytesIO(encoded)) as image:
        return getattr(image, "n_frames", 1) > 1


def _decode_multichannel_tiff(encoded: bytes) -> np.ndarray:
    """Return a TIFF whose channels are pages or samples of a pixel."""
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        series = file.series[0]
        return np.moveaxis(series.asarray(), [series.axes.index(a) for a in "YX"], [0, 1])


def _decode_numpy(encoded: bytes) -> np.ndarray:
    """Return the array of a .npy, or of a .npz its only array or the one called "image"."""
    try:
        loaded: Any = np.load(io.BytesIO(encoded), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        name = loaded.files[0] if len(loaded.files) == 1 else "image"
        if name in loaded:
            return loaded[name]
    except Exception as error:
        raise DataError(f"it is not a complete numpy file of numbers: {error}") from error
    raise DataError(f"it has the arrays {', '.join(loaded.files)}, but none called 'image'")


def _to_pixels(array: np.ndarray, channels: int) -> Pixels:
    """Convert an array with channels last or first to pixels.

    Raises:
      DataError: it has another number of channels, or NaN or Inf.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] != channels or not array.size:
        raise DataError(
            f"its shape is {list(array.shape)}, but the shape of an image of "
            f"model.channels={channels} is [height, width, {channels}]"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "iuf":
        raise DataError(f"its dtype is {array.dtype}, which is not numeric")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise DataError("it contains NaN or Inf")
    return array
