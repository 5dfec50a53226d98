"""Read TIFFs: photographs of up to 16 bits, and samples of any number of bands and dtype.

Pages of reduced resolution (overviews) and masks are ignored. The pages that are left are the
bands of one image, like the samples of a pixel.
"""

import io
import logging
import math
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError
from tifffile import PHOTOMETRIC

from mae_jax.data import tiff_codecs
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sources import DataError

BIG_ENDIAN_BIGTIFF = b"MM\0+"  # of which Pillow cannot read the EXIF tags
GDAL_METADATA, GDAL_NODATA = 42112, 42113  # tags
REDUCED, MASK = 1, 4  # flags of NewSubfileType
UNSIGNED = 1  # sample format
ALPHA = (1, 2)  # extra samples that are transparency
GRAY = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
CONVERTED = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.PALETTE)  # to other values than those stored
MODES = {1: "L", 3: "RGB"}

# It warns of NoData that is no value of the dtype, in every file and at every read.
logging.getLogger("tifffile").setLevel(logging.ERROR)


class Raster(NamedTuple):
    """Samples of a file [h, w, c].

    bits: of a gray or RGB picture's values, at most 16; None for samples in their own units.
    nodata: value of samples without data that the file names.
    stored: the values [h, w, 1] that NoData is one of, if `array` has others: colors of a palette.
    """

    array: np.ndarray
    bits: int | None
    nodata: float | None = None
    stored: np.ndarray | None = None


def read_tiff(encoded: bytes, channels: int, options: ReadOptions) -> Raster:
    """Read the image of a TIFF, upright.

    With 1 or 3 channels, alpha is dropped, and 8 bits are converted. The samples of `options.bands`
    stay as they are.

    Raises:
      DataError: its kind is not supported; says what it is. Or it lacks a band.
    """
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        pages = _image_pages(file)
        page = pages[0]
        _check(page)
        nodata, stored = _nodata_value(page), None
        if options.bands is not None:
            planes = _planes_without_pages(file, page)
            planes = _concatenate(pages, encoded) if planes is None else planes
            indices = _band_indices(page, planes.shape[-1], options.band_list)
            return Raster(_upright(planes[..., indices], page), None, nodata)
        raster = _read_pages(file, pages, encoded, channels)
        if page.photometric in CONVERTED and options.nodata is not None:
            stored = _upright(_samples(page, encoded)[..., :1], page)
        return raster._replace(nodata=nodata, stored=stored)


def _read_pages(
    file: tifffile.TiffFile, pages: list[tifffile.TiffPage], encoded: bytes, channels: int
) -> Raster:
    page = pages[0]
    planes = _planes_without_pages(file, page)
    is_picture = channels in MODES and len(pages) == 1 and planes is None and _is_picture(page)
    if is_picture and page.bitspersample <= 8:
        picture = _picture_of_8_bits(encoded, page, MODES[channels])
        if picture is not None:
            return Raster(picture, 8)
    if is_picture:
        array, bits = _picture(page, encoded)
        return Raster(_upright(array, page), bits)
    if planes is None:
        planes = _concatenate(pages, encoded)
    return Raster(_upright(_without_alpha(planes, pages, channels), page), None)


def _concatenate(pages: list[tifffile.TiffPage], encoded: bytes) -> np.ndarray:
    """Return the samples of all pages [h, w, bands]."""
    return np.concatenate([_samples(page, encoded) for page in pages], axis=-1)


def _band_indices(page: tifffile.TiffPage, count: int, bands: tuple[int | str, ...]) -> list[int]:
    """Return the indices of bands, given by number from 1 or by GDAL's description.

    Raises:
      DataError: there is no such band, or several have that name.
    """
    names = _band_names(page)
    indices = []
    for band in bands:
        matches = (
            [band - 1] if isinstance(band, int) else [i for i, n in names.items() if n == band]
        )
        if len(matches) != 1 or matches[0] >= count:
            known = ", ".join(f"{i + 1} {names.get(i, '(no name)')}" for i in range(count))
            problem = "several bands" if len(matches) > 1 else "no band"
            raise DataError(f"it has {problem} {band!r} (data.bands); its bands are {known}")
        indices += matches
    return indices


def _band_names(page: tifffile.TiffPage) -> dict[int, str]:
    """Return GDAL's descriptions of bands by index from 0."""
    text = str(page.tags.valueof(GDAL_METADATA, "")).strip(" \0")
    if not text:
        return {}
    try:
        items = ElementTree.fromstring(text).iter("Item")
        described = [item for item in items if item.get("role") == "description"]
        return {int(item.get("sample", "")): (item.text or "").strip() for item in described}
    except (ElementTree.ParseError, ValueError):
        return {}


def _nodata_value(page: tifffile.TiffPage) -> float | None:
    """Return GDAL's NoData value of a page; None without it."""
    try:
        return float(str(page.tags.valueof(GDAL_NODATA)).strip(" \0").replace(",", "."))
    except Exception:  # of a tag without a number, or a corrupt one
        return None


def _upright(array: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    return apply_orientation(array, page.tags.valueof(274, 1))


def apply_orientation(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels upright, of an EXIF orientation."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array[::-1] if orientation in (3, 4, 7, 8) else array


def _image_pages(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return the pages with the size and dtype of the first one that is the full image."""
    pages = [page for page in file.pages if isinstance(page, tifffile.TiffPage)]
    full = [page for page in pages if _is_full(page)]
    if not full:  # as in raw photographs
        subs: list[Any] = [sub for page in pages for sub in page.pages or ()]
        full = [sub for sub in subs if _is_full(sub)]
    first, *others = full or pages[:1]
    key = first.imagelength, first.imagewidth, first.dtype
    return [first, *(p for p in others if (p.imagelength, p.imagewidth, p.dtype) == key)]


def _is_full(page: tifffile.TiffPage) -> bool:
    return not page.subfiletype & (REDUCED | MASK) and page.photometric != PHOTOMETRIC.MASK


def _check(page: tifffile.TiffPage) -> None:
    pixels = page.imagelength * page.imagewidth
    if pixels > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise DataError(f"it has {pixels:,} pixels, which could be a decompression bomb: cut it up")
    if page.photometric == PHOTOMETRIC.CFA:
        raise DataError("it is the raw mosaic of a camera's sensor: develop it, to TIFF or PNG")
    if page.dtype is None:
        raise DataError(
            f"it is {_describe(page)}, whose values numpy cannot hold: save it with 8 or 16 bits"
        )


def _is_picture(page: tifffile.TiffPage) -> bool:
    """Return whether a page is a gray or color picture rather than bands of samples."""
    if page.sampleformat != UNSIGNED or not isinstance(page.bitspersample, int):
        return False
    colors = page.samplesperpixel - sum(kind in ALPHA for kind in page.extrasamples)
    return page.bitspersample <= 16 and (page.photometric not in GRAY or colors == 1)


def _picture_of_8_bits(encoded: bytes, page: tifffile.TiffPage, mode: str) -> np.ndarray | None:
    """Return a page as Pillow converts it; None if Pillow does not support its kind."""
    if page.compression == tiff_codecs.WEBP or encoded.startswith(BIG_ENDIAN_BIGTIFF):
        return None
    if len(page.treeindex) > 1:  # a sub-page, which Pillow does not count
        return None
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.seek(page.index)
            array = np.asarray(image.convert(mode))
    except UnidentifiedImageError:
        return None
    return array.reshape(*array.shape[:2], -1)


def _picture(page: tifffile.TiffPage, encoded: bytes) -> tuple[np.ndarray, int]:
    """Return gray or RGB values [h, w, 1 or 3], and their number of bits."""
    samples, bits = _samples(page, encoded), page.bitspersample
    if page.photometric == PHOTOMETRIC.MINISBLACK:
        return samples[..., :1], bits
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        return (2**bits - 1) - samples[..., :1], bits
    is_rgb = page.photometric == PHOTOMETRIC.RGB
    # Decoders of JPEG convert to RGB.
    is_jpeg = page.photometric == PHOTOMETRIC.YCBCR and page.compression in tiff_codecs.JPEGS
    if (is_rgb or is_jpeg) and samples.shape[-1] >= 3:
        return samples[..., :3], bits
    if page.photometric == PHOTOMETRIC.PALETTE and page.colormap is not None:
        return np.moveaxis(page.colormap[:, samples[..., 0]], 0, -1), 16
    if page.photometric == PHOTOMETRIC.SEPARATED and samples.shape[-1] >= 4:
        ink = (samples[..., :4] >> max(bits - 8, 0)).astype(np.uint8)
        return np.asarray(Image.fromarray(np.ascontiguousarray(ink), "CMYK").convert("RGB")), 8
    raise DataError(f"it is {_describe(page)}, which is not supported: save it as RGB or gray")


def _samples(page: tifffile.TiffPage, encoded: bytes) -> np.ndarray:
    """Return the samples of a page [h, w, samples], by tifffile, else by Pillow.

    Raises:
      DataError: they are compressed in a way that needs imagecodecs.
    """
    try:
        array = page.asarray(maxworkers=1)
    except (ValueError, LookupError, ImportError, NotImplementedError) as error:
        if tiff_codecs.can_decode(page):
            return tiff_codecs.decode_page(page)
        array = _samples_by_pillow(page, encoded)
        if array is not None:
            return array
        if not isinstance(error, ImportError) and "imagecodecs" not in str(error):
            raise
        raise DataError(
            f"it is {_describe(page)}, which needs imagecodecs: pip install 'mae_jax[tiff]', or "
            "save it uncompressed"
        ) from error
    return _channels_last(array, page.axes)


def _samples_by_pillow(page: tifffile.TiffPage, encoded: bytes) -> np.ndarray | None:
    """Return uint8 samples, as of JPEG; None if Pillow does not return all of them."""
    if len(page.treeindex) > 1:  # a sub-page, which Pillow does not count
        return None
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.seek(page.index)
            array = np.asarray(image)
    except (OSError, SyntaxError):
        return None
    array = array.reshape(*array.shape[:2], -1)
    expected = page.imagelength, page.imagewidth, page.samplesperpixel
    return array if array.dtype == page.dtype == np.uint8 and array.shape == expected else None


def _channels_last(array: np.ndarray, axes: str) -> np.ndarray:
    """Return an array [h, w, c] of one with the axes Y, X and at most one more."""
    array = np.moveaxis(array, [axes.index("Y"), axes.index("X")], [0, 1])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    return array[..., None] if array.ndim == 2 else array


def _planes_without_pages(file: tifffile.TiffFile, page: tifffile.TiffPage) -> np.ndarray | None:
    """Return the bands of ImageJ's and tifffile's files of one page with several planes."""
    if len(file.pages) > 1 or not (file.is_imagej or file.is_shaped):
        return None
    series = file.series[0]
    if math.prod(series.shape) <= math.prod(page.shape):
        return None
    return _channels_last(series.asarray(maxworkers=1), series.axes)


def _without_alpha(array: np.ndarray, pages: list[tifffile.TiffPage], channels: int) -> np.ndarray:
    """Drop alpha if the right number of channels is left; check what cannot be an image.

    Raises:
      DataError: the pages are several color pictures.
    """
    samples, extra = pages[0].samplesperpixel, pages[0].extrasamples
    if len(pages) > 1 and array.shape[-1] != channels:
        raise DataError(
            f"its shape is {list(array.shape)} with its {len(pages)} pages as channels, but "
            f"model.channels={channels}: save each page as a file, if each is an image"
        )
    if len(pages) == 1 and array.shape[-1] == samples != channels:
        alpha = [samples - len(extra) + i for i, kind in enumerate(extra) if kind in ALPHA]
        if samples - len(alpha) == channels:
            return np.delete(array, alpha, axis=-1)
    return array


def _describe(page: tifffile.TiffPage) -> str:
    """Return the kind of a page, as in "a TIFF of 4 x uint16, compressed with LZW"."""
    values = page.dtype.name if page.dtype is not None else f"{page.bitspersample} bits"
    color, codec = (getattr(x, "name", x) for x in (page.photometric, page.compression))
    kind = f"a TIFF ({color}) of {page.samplesperpixel} x {values}"
    return kind if page.compression == 1 else f"{kind}, compressed with {codec}"
