"""Read DICOM files of one frame through pydicom: gray in its own units or windowed, and color."""

import io
import math

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)
from pydicom.pixels.utils import pixel_array

from mae_jax.data.read_options import FILE, ReadOptions
from mae_jax.data.sources import DataError
from mae_jax.data.tiff import Raster

GRAY = ("MONOCHROME1", "MONOCHROME2")
FAR = np.array([-1e12, 1e12])  # beyond every window


def read_dicom(encoded: bytes, channels: int, options: ReadOptions) -> Raster:
    """Read the image of a DICOM file.

    Gray values have the modality LUT applied, as Hounsfield units of CT, and are in these units, or
    with `options.dicom_window` in 8 bits. MONOCHROME1 is inverted. Color becomes RGB.

    Raises:
      DataError: there is no image, or several; it needs a package; or it has no window.
    """
    dataset = pydicom.dcmread(io.BytesIO(encoded))
    _check(dataset)
    array = _pixels(dataset)
    array = array.reshape(*array.shape[:2], -1)
    if dataset.PhotometricInterpretation not in GRAY:
        return _color(array, dataset)
    values = apply_modality_lut(array, dataset)
    # Padding is a stored value; a number of the user is in the units of the image.
    padding, stored = _padding(array, dataset)
    nodata = None if padding is None else float(padding)
    if options.nodata != FILE:
        stored = values
    if options.dicom_window is not None:
        return Raster(_windowed(values, dataset, options), 8, nodata, stored)
    values = _bright_is_large(values, dataset)
    is_picture = values.dtype == np.uint8
    if channels != 1 and not is_picture:
        raise DataError(
            f"it is a gray DICOM image of {values.dtype.name} values: read it with "
            "model.channels=1, or set data.dicom_window, which makes pictures of 8 bits"
        )
    return Raster(values, 8 if is_picture else None, nodata, stored)


def _check(dataset: Dataset) -> None:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = getattr(dataset.get("SOPClassUID"), "name", "unknown kind")
        raise DataError(f"it is a DICOM file without an image ({kind})")
    scale = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    if None in scale or scale[0] == 0:
        slope, intercept = ("missing" if x is None else f"{x:g}" for x in scale)
        raise DataError(f"its rescale slope is {slope}, and its intercept {intercept}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise DataError(f"it is a DICOM file of {frames} frames: save each one as a file")
    count = int(dataset.Rows) * int(dataset.Columns)
    if count > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(f"it has {count:,} pixels, which could be a decompression bomb: cut it up")


def _pixels(dataset: Dataset) -> np.ndarray:
    """Return the stored values; colors as RGB, unless they are of a palette.

    Raises:
      DataError: they are compressed in a way that no installed package can decode.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.is_encapsulated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise DataError(
                f"it is a DICOM file compressed with {syntax.name}, which pydicom decodes with "
                "other packages: pip install 'pylibjpeg[all]', or save it uncompressed"
            )
    try:
        return pixel_array(dataset, index=0)
    except RuntimeError as error:  # of a plugin
        reason = " ".join(str(error).split())
        raise DataError(
            f"it is a DICOM file compressed with {syntax.name}, which is corrupt or needs other "
            f"packages (pip install 'pylibjpeg[all]'): {reason}"
        ) from error


def _color(array: np.ndarray, dataset: Dataset) -> Raster:
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colors = apply_color_lut(array[..., 0], dataset)[..., :3]
        return Raster(colors, 8 * colors.dtype.itemsize, stored=array)
    if array.shape[-1] != 3 or array.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"it is a DICOM file of {array.shape[-1]} x {array.dtype} "
            f"({dataset.PhotometricInterpretation}), which is not supported: save it as RGB or gray"
        )
    return Raster(array, int(dataset.BitsStored))


def _padding(array: np.ndarray, dataset: Dataset) -> tuple[int | None, np.ndarray]:
    """Return the padding value, and stored values, of which a range of padding has that value.

    Padding may use bits beyond BitsStored, which `array` lacks, and be unsigned in the header of
    signed values.
    """
    first = dataset.get("PixelPaddingValue")
    if first is None or array.dtype.kind not in "iu":
        return first, array
    last = dataset.get("PixelPaddingRangeLimit", first)
    first, last = (int(np.array(int(x)).astype(array.dtype)) for x in (first, last))
    bits = int(dataset.BitsStored) - (array.dtype.kind == "i")
    if max(x if x >= 0 else ~x for x in (first, last)) >= 2**bits:
        array = pixel_array(dataset, index=0, correct_unused_bits=False).reshape(array.shape)
    padded = (array >= min(first, last)) & (array <= max(first, last))
    return first, np.where(padded, np.array(first, array.dtype), array)


def _bright_is_large(values: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return values of which larger ones are brighter: MONOCHROME1 is mirrored in its range."""
    if dataset.PhotometricInterpretation != "MONOCHROME1":
        return values
    bits, signed = int(dataset.BitsStored), int(dataset.PixelRepresentation)
    ends = np.array([0, 2**bits - 1]) - signed * 2 ** (bits - 1)
    low, high = apply_modality_lut(ends.astype(np.int64), dataset)
    return (low + high - values).astype(values.dtype)


def _windowed(values: np.ndarray, dataset: Dataset, options: ReadOptions) -> np.ndarray:
    """Return a window of the values as uint8, as it is displayed.

    Raises:
      DataError: the window of the file is wanted, but it has none.
    """
    if options.window is not None:  # of the user
        dataset.WindowCenter, dataset.WindowWidth = options.window
        dataset.VOILUTFunction = "LINEAR"
    elif dataset.get("VOILUTSequence"):
        levels = apply_voi(np.round(values).astype(np.int64), dataset)
        low, high = 0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
        return _to_gray_levels(levels, low, high, dataset)
    elif None in (dataset.get("WindowCenter"), dataset.get("WindowWidth")):
        raise DataError(
            "it is a DICOM file without a window: set data.dicom_window to CENTER,WIDTH, as 40,400"
        )
    with np.errstate(over="ignore"):  # of a sigmoid
        low, high = apply_windowing(FAR, dataset)
        return _to_gray_levels(apply_windowing(values, dataset), low, high, dataset)


def _to_gray_levels(levels: np.ndarray, low: float, high: float, dataset: Dataset) -> np.ndarray:
    gray = (255 * ((levels - low) / (high - low)).clip(0, 1)).round().astype(np.uint8)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray
