"""Decode images to arrays [height, width, channels], detecting corrupt files.

JPEGs are decoded by libjpeg-turbo (simplejpeg): bit-identical to Pillow, faster, and it detects
corruption that Pillow decodes to garbage. TIFFs are read in `mae_jax.data.tiff`, DICOM in
`mae_jax.data.dicom`, other images by Pillow, arrays by numpy. All commands read images here.
"""

import dataclasses
import io
import math
import re
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import Bool, Shaped
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import StubImageFile

from mae_jax.data import png
from mae_jax.data.file_kinds import (
    DICOM,
    DICOM_OFFSET,
    JPEG,
    NUMPY,
    PNG,
    TIFF,
    UPRIGHT,
    why_not_an_image,
)
from mae_jax.data.read_options import FILE, ReadOptions
from mae_jax.data.sources import DataError
from mae_jax.data.tiff import MODES, Raster, apply_orientation, read_tiff

Encoded = bytes | np.ndarray  # the bytes of a file, or an array that needs no decoding
Pixels = Shaped[np.ndarray, "h w c"]  # uint8 in 0..255; else uint16 or float32 in their own units

# libjpeg's messages about lost pixels; a few extraneous bytes before the end marker lose none.
CORRUPT = re.compile(r"Premature end|Corrupt JPEG data: (?!\d extraneous bytes before marker 0xd9)")
ORIENTATION = 0x0112  # EXIF tag
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of Pillow


def decode(
    encoded: Encoded,
    channels: int,
    exif: bool = False,
    bit_depth: int | None = None,
    options: ReadOptions = ReadOptions(),
) -> Pixels:
    """Decode an image: to gray or RGB for 1 or 3 channels, else to its own channels.

    As in the official code, alpha is dropped (with 1 or 3 channels), and the EXIF orientation is
    applied only with `exif`.

    Args:
      bit_depth: of uint16 values; makes all integers fractions of their range, float32. By
        default, gray and RGB pictures of 16 bits are scaled to 8 bits.
      options: with `nodata`, the image is float32 with NaN where it has no data; values that would
        be uint8 without it are divided by 255.

    Raises:
      DataError: the file is corrupt, not an image, or has another number of channels; or it has
        NaN or Inf without `options.nodata`.
    """
    if options.nodata is None:
        raster = _read(encoded, channels, exif, bit_depth is not None, options)
        _check_finite(raster.array)
        return _convert(raster, channels, bit_depth)
    image = decode_masked(encoded, channels, exif, bit_depth, options)
    scale = 255 if image.pixels.dtype == np.uint8 else 1
    values = image.pixels.astype(np.float32) / np.float32(scale)
    values[image.missing] = np.nan
    return values


class MaskedImage(NamedTuple):
    """An image in the units of its file, and where its samples have no data.

    The pixels are 0 where they are NaN or Inf, and with `nodata` wherever data are missing. value:
    NoData that the file names, or None.
    """

    pixels: Pixels
    missing: Bool[np.ndarray, "h w c"]
    value: float | None


def decode_masked(
    encoded: Encoded,
    channels: int,
    exif: bool = False,
    bit_depth: int | None = None,
    options: ReadOptions = ReadOptions(),
) -> MaskedImage:
    """Decode an image of which samples may be missing; without `nodata`, as if it were "file".

    Raises:
      DataError: as in `decode`, but not for NaN and Inf.
    """
    is_named = options.nodata is not None
    options = dataclasses.replace(options, nodata=options.nodata or FILE)
    # All bits of a picture, since NoData is one of the values in the file.
    keep_bits = bit_depth is not None or (is_named and channels in MODES)
    raster = _read(encoded, channels, exif, keep_bits, options)
    array, stored, value = raster.array, raster.stored, raster.nodata
    missing = options.is_missing(array if stored is None else stored, value)
    # NoData need not fit into bit_depth.
    invalid = missing if is_named else ~np.isfinite(array)
    if invalid.any():
        array = np.where(invalid, np.zeros((), array.dtype), array)
    pixels = _convert(raster._replace(array=array), channels, bit_depth)
    if missing.shape[-1] not in (1, pixels.shape[-1]):  # colors that became gray
        missing = missing.any(axis=-1, keepdims=True)
    return MaskedImage(pixels, np.broadcast_to(missing, pixels.shape), value)


def used_bits(encoded: Encoded, channels: int) -> tuple[int, int] | None:
    """Return the bits that the values of a picture use and have; None unless `decode` cuts them.

    Raises:
      DataError: as in `decode`.
    """
    if isinstance(encoded, np.ndarray) or encoded.startswith((JPEG, *NUMPY)):
        return None
    if encoded.startswith(PNG) and not png.has_16_bits(encoded):
        return None
    raster = _read(encoded, channels, False, True, ReadOptions())
    if raster.bits is None or raster.bits <= 8:
        return None
    return int(raster.array.max()).bit_length(), raster.bits


def _read(
    encoded: Encoded, channels: int, exif: bool, keep_bits: bool, options: ReadOptions
) -> Raster:
    """Return an image, upright with `exif`; pictures of 16 bits have 8 unless `keep_bits`.

    Raises:
      DataError: as in `decode`.
    """
    if isinstance(encoded, np.ndarray):
        _require_tiff(options)
        return Raster(_to_pixels(encoded, channels), None)
    try:
        raster = _read_bytes(encoded, channels, keep_bits, options)
        # Of a TIFF, the orientation is always applied, as by Pillow.
        if not exif or encoded.startswith(UPRIGHT):
            return raster
        upright = apply_orientation(raster.array, exif_orientation(encoded))
        return raster._replace(array=upright)
    except DataError:
        raise
    except MemoryError:
        raise DataError("there is not enough memory to decode it") from None
    except UnidentifiedImageError:
        raise DataError(why_not_an_image(encoded)) from None
    except Exception as error:  # decoders raise all kinds of errors for corrupt bytes
        raise DataError(str(error) or type(error).__name__) from error


def _read_bytes(encoded: bytes, channels: int, keep_bits: bool, options: ReadOptions) -> Raster:
    is_dicom = encoded.startswith(DICOM, DICOM_OFFSET)  # which may begin like a TIFF
    if encoded.startswith(TIFF) and not is_dicom:
        return _in_pixels(read_tiff(encoded, channels, options), channels)
    _require_tiff(options)
    if is_dicom:
        return _in_pixels(_read_dicom(encoded, channels, options), channels)
    if encoded.startswith(NUMPY):
        return Raster(_to_pixels(decode_numpy(encoded), channels), None)
    array = _decode_jpeg(encoded, channels) if encoded.startswith(JPEG) else None
    if array is not None:
        return Raster(array, 8)
    return _read_with_pillow(encoded, channels, keep_bits)


def _in_pixels(raster: Raster, channels: int) -> Raster:
    if raster.bits is not None:
        return raster
    return raster._replace(array=_to_pixels(raster.array, channels))


def _read_dicom(encoded: bytes, channels: int, options: ReadOptions) -> Raster:
    try:
        from mae_jax.data.dicom import read_dicom
    except ImportError:
        raise DataError(
            "it is a DICOM file, which needs pydicom: pip install 'mae_jax[dicom]'"
        ) from None
    return read_dicom(encoded, channels, options)


def _require_tiff(options: ReadOptions) -> None:
    if options.bands is not None:
        raise DataError(f"it is not a TIFF, of which data.bands={options.bands} are bands")


def open_image(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, without the color profile and the text of a PNG."""
    return Image.open(io.BytesIO(png.without_text(encoded)))


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


def _read_with_pillow(encoded: bytes, channels: int, keep_bits: bool) -> Raster:
    with open_image(encoded) as file:
        image: Image.Image = file
        if isinstance(image, StubImageFile):  # Pillow knows the name of the format only
            raise UnidentifiedImageError
        if keep_bits and png.has_16_bits(encoded):
            array = png.read_16_bits(encoded, image.size)
            colors = 3 if array.shape[-1] >= 3 else 1
            return Raster(array[..., :colors] if channels in MODES else array, 16)
        if image.mode == "P":  # colors by number, of which Pillow warns if some are transparent
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if channels == 2 and png.has_16_bits(encoded):  # Pillow makes RGBA of gray and alpha
            upper = (png.read_16_bits(encoded, image.size) >> 8).astype(np.uint8)
            return Raster(_to_pixels(upper, channels), None)
        if channels not in MODES:
            return Raster(_to_pixels(np.asarray(image), channels), None)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            return Raster(np.asarray(image).astype(np.uint16)[..., None], 16)
        if image.mode in ("I", "F"):
            raise ValueError(
                f"its pixels are 32-bit numbers (mode {image.mode}); save it as TIFF or .npy"
            )
        array = np.asarray(image.convert(MODES[channels]))
        return Raster(array.reshape(*array.shape[:2], channels), 8)


def _check_finite(array: np.ndarray) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        share = 100 * (1 - np.isfinite(array).mean())
        raise DataError(
            f"it contains NaN or Inf, {share:.3g} % of its values: replace them, as by the mean, "
            "or leave them out with data.nodata=nan"
        )


def _convert(raster: Raster, channels: int, bit_depth: int | None) -> Pixels:
    """Return the pixels that `decode` describes."""
    if bit_depth is None:
        return _to_8_bits(raster, channels)
    return _to_fractions(raster, channels, bit_depth)


def _to_8_bits(raster: Raster, channels: int) -> Pixels:
    """Return gray or RGB pictures as uint8, other samples as they are."""
    array, bits = raster.array, raster.bits
    if bits is None:
        return array
    if bits < 8 or (bits > 8 and array.shape[-1] == 1):
        array = (array.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
    elif bits > 8:
        array = (array >> (bits - 8)).astype(np.uint8)  # as Pillow does
    if channels == array.shape[-1]:
        return array
    image = Image.fromarray(array.squeeze(-1) if channels == 3 else array)
    return np.asarray(image.convert(MODES[channels])).reshape(*array.shape[:2], channels)


def _to_fractions(raster: Raster, channels: int, bit_depth: int) -> Pixels:
    """Return integers over the largest one of their range, float32; gray or RGB as requested.

    Raises:
      DataError: the values exceed the bit depth.
    """
    array, bits = raster.array, raster.bits
    if array.dtype == np.float32:
        return array
    depth = 8 if array.dtype == np.uint8 else bit_depth
    if bits is not None and bits < 16:
        depth = bits
    largest = int(array.max())
    if largest >= 2**depth:
        raise DataError(
            f"its largest value, {largest}, has {largest.bit_length()} bits, more than "
            f"data.bit_depth={bit_depth}"
        )
    values = array.astype(np.float32) / (2**depth - 1)
    if values.shape[-1] == channels or bits is None:
        return values
    return np.repeat(values, 3, axis=-1) if channels == 3 else values @ LUMA[:, None]


def exif_orientation(encoded: bytes) -> int:
    """Return the EXIF orientation; 1, upright, also if the EXIF tags cannot be read."""
    for open_file in (lambda x: Image.open(io.BytesIO(x)), open_image):
        try:
            with open_file(encoded) as image:
                return image.getexif().get(ORIENTATION, 1)
        except (ValueError, SyntaxError, OSError):
            continue  # perhaps of the text or color profile of a PNG, which open_image leaves out
    return 1


def decode_numpy(encoded: bytes) -> np.ndarray:
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
      DataError: it has another number of channels, or is not numeric.
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
    with np.errstate(over="ignore"):  # Inf, as NoData of float64 may become
        return array.astype(np.float32, copy=False)
