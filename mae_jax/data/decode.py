"""Encoded images to arrays [height, width, channels], and the errors of those that are none.

JPEGs go through libjpeg-turbo (simplejpeg), to the same bits as Pillow and faster; it also notices
damage that Pillow decodes to garbage. Other pictures go through Pillow, stacks of channels through
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

Encoded = bytes | np.ndarray  # a file's bytes, or an array that needs no decoding
Pixels = Shaped[np.ndarray, "h w c"]  # uint8 of 0..255; else uint16 or float32 in units of its own

MODES = {1: "L", 3: "RGB"}
JPEG, NPY, ZIP = b"\xff\xd8\xff", b"\x93NUMPY", b"PK\x03\x04"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# What libjpeg says where pixels are lost: not of a few bytes too many before the end of the file.
DAMAGE = re.compile(r"Premature end|Corrupt JPEG data: (?!\d extraneous bytes before marker 0xd9)")
ORIENTATION = 0x0112  # tag of EXIF


def decode(encoded: Encoded, channels: int, exif: bool = False) -> Pixels:
    """The pixels of an image: of 1 or 3 channels grey or RGB, of any other number as they are.

    As in the reference alpha is dropped (with 1 or 3 channels), and images are turned as their
    EXIF tells only if `exif` asks for it.

    Raises:
      DataError: the bytes are not a whole image, or not one of so many channels.
    """
    if isinstance(encoded, np.ndarray):
        return _checked(encoded, channels)
    try:
        if encoded.startswith((NPY, ZIP)):
            return _checked(_load(encoded), channels)
        if encoded.startswith(TIFF) and _is_stack(encoded, channels):
            return _checked(_stack(encoded), channels)
        array = _jpeg(encoded, channels) if encoded.startswith(JPEG) else None
        if array is None:
            array = _picture(encoded, channels)
        turned = encoded.startswith(TIFF)  # already: Pillow does it while it loads a TIFF
        return _upright(array, encoded) if exif and not turned else array
    except DataError:
        raise
    except MemoryError:
        raise DataError("there is not enough memory to decode it") from None
    except UnidentifiedImageError:
        raise DataError(_no_image(encoded)) from None
    except Exception as error:  # damaged bytes make decoders raise whatever there is
        raise DataError(str(error) or type(error).__name__) from error


def _no_image(encoded: bytes) -> str:
    if not encoded:
        return "it is empty"
    if encoded.lstrip()[:1] == b"<":
        return "it is a web page or other markup, not an image"
    return "its bytes are not an image"


def _jpeg(encoded: bytes, channels: int) -> Pixels | None:
    """A JPEG; None for those that Pillow has to do, or to refuse."""
    try:
        header: Any = simplejpeg.decode_jpeg_header(encoded, strict=False)
    except (ValueError, KeyError):  # KeyError: there is no picture after the header
        return None
    height, width, colours, _ = header
    bomb = height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if channels not in MODES or colours in ("CMYK", "YCCK") or bomb:
        return None
    as_grey = channels == 1 and colours == "Gray"
    try:
        array = simplejpeg.decode_jpeg(encoded, "GRAY" if as_grey else "RGB", strict=True)
    except ValueError as error:
        if DAMAGE.match(str(error)):
            raise
        return None  # odd, but not known to be damaged
    if channels == 1 and not as_grey:
        array = np.asarray(Image.fromarray(array).convert("L"))[..., None]
    return array


def _picture(encoded: bytes, channels: int) -> Pixels:
    with Image.open(io.BytesIO(encoded)) as image:
        if channels not in MODES:
            return _checked(np.asarray(image), channels)
        array = np.asarray(_eight_bit(image).convert(MODES[channels]))
        return array.reshape(*array.shape[:2], channels)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture with 16-bit values scaled down; Pillow's own conversion would clip them at 255.

    Raises:
      ValueError: values of 32 bits, of which nobody knows the range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image, np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}); save it with 8 bits, or as .npy"
        )
    return image


def _upright(array: Pixels, encoded: bytes) -> Pixels:
    """Turned and mirrored as EXIF tells."""
    orientation = orientation_of(encoded)
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def orientation_of(encoded: bytes) -> int:
    """What EXIF tells: 1 is upright."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.getexif().get(ORIENTATION, 1)


def _is_stack(encoded: bytes, channels: int) -> bool:
    """Whether a TIFF is one page per channel, or has more channels than a picture."""
    if channels not in MODES:
        return True
    with Image.open(io.BytesIO(encoded)) as image:
        return getattr(image, "n_frames", 1) > 1


def _stack(encoded: bytes) -> np.ndarray:
    """A TIFF of many channels, be they pages or samples of a pixel."""
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        series = file.series[0]
        return np.moveaxis(series.asarray(), [series.axes.index(a) for a in "YX"], [0, 1])


def _load(encoded: bytes) -> np.ndarray:
    """The array of a .npy, or the only one, or the one called "image", of a .npz."""
    try:
        found: Any = np.load(io.BytesIO(encoded), allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        name = found.files[0] if len(found.files) == 1 else "image"
        if name in found:
            return found[name]
    except Exception as error:
        raise DataError(f"it is no whole numpy file of numbers: {error}") from error
    raise DataError(f"it has the arrays {', '.join(found.files)}: one has to be called 'image'")


def _checked(array: np.ndarray, channels: int) -> Pixels:
    """An array as pixels of so many channels, which may come first where they cannot be last.

    Raises:
      DataError: it has another number of channels, or values that are not finite numbers.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[-1] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] != channels or not array.size:
        raise DataError(
            f"its shape is {list(array.shape)}, and an image of model.channels={channels} is "
            f"[height, width, {channels}]"
        )
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind not in "iuf":
        raise DataError(f"it is an array of {array.dtype}, not of numbers")
    array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise DataError("it holds values that are not finite numbers")
    return array
