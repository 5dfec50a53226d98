"""Compressed TIFFs that tifffile reads only with imagecodecs, by the libtiff of Pillow.

Source: https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf; floating-point predictor:
http://chriscox.org/TIFFTN3d1.pdf
"""

import io
import struct
from typing import Any

import numpy as np
import tifffile
from PIL import Image

# LZW, Deflate, LZMA and ZSTD: codecs of bytes, which know nothing of pixels.
BYTE_CODECS = (5, 8, 32946, 34925, 50000)
NONE = 1  # compression, and predictor
WEBP = 50001  # compression
JPEGS = (6, 7)  # compressions
HORIZONTAL, FLOATING_POINT = 2, 3  # predictors
SHORT, LONG = 3, 4  # field types


def can_decode(page: tifffile.TiffPage) -> bool:
    """Return whether `decode_page` supports the compression and layout of a page."""
    if page.fillorder != 1 or page.imagedepth != 1 or page.dtype is None:
        return False
    if page.compression == WEBP:
        contiguous = page.planarconfig == 1 and page.samplesperpixel in (3, 4)
        return contiguous and page.dtype == np.uint8
    if page.compression not in (NONE, *BYTE_CODECS):
        return False
    if _is_packed(page):
        return page.predictor == NONE and page.dtype.kind == "u"
    return page.predictor in (NONE, HORIZONTAL, FLOATING_POINT)


def _is_packed(page: tifffile.TiffPage) -> bool:
    """Return whether values have a number of bits that no dtype has, as 12."""
    return page.bitspersample != 8 * np.dtype(page.dtype).itemsize


def decode_page(page: tifffile.TiffPage) -> np.ndarray:
    """Return the samples of a page [h, w, samples] in the dtype of the file.

    Raises:
      OSError: the data are corrupt, or Pillow was built without this codec.
    """
    separate = page.planarconfig == 2 and page.samplesperpixel > 1
    planes = page.samplesperpixel if separate else 1
    samples = 1 if separate else page.samplesperpixel
    height, width = page.imagelength, page.imagewidth
    rows, columns = min(page.rowsperstrip, height), width
    if page.is_tiled:
        rows, columns = page.tilelength, page.tilewidth
    down, across = -(-height // rows), -(-width // columns)
    image = np.full((planes, height, width, samples), page.nodata, page.dtype)
    segments: Any = page.parent.filehandle.read_segments(page.dataoffsets, page.databytecounts)
    for data, index, *_ in segments:
        if data is None:
            continue  # not written
        plane, y, x = np.unravel_index(index, (planes, down, across))
        target = image[plane, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
        shape = (rows if page.is_tiled else target.shape[0], columns, samples)
        target[:] = _decode_segment(page, data, shape)[: target.shape[0], : target.shape[1]]
    return np.concatenate(list(image), axis=-1)


def _decode_segment(
    page: tifffile.TiffPage, data: bytes, shape: tuple[int, int, int]
) -> np.ndarray:
    """Return a strip or tile [rows, columns, samples]."""
    if page.compression == WEBP:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert({3: "RGB", 4: "RGBA"}[shape[-1]]))
    dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    size = shape[0] * -(-shape[1] * shape[2] * page.bitspersample // 8)
    if page.compression != NONE:
        data = _decompress(data, int(page.compression), size)
    if _is_packed(page):
        return _unpack(data[:size], shape, page.bitspersample).astype(page.dtype)
    if page.predictor == FLOATING_POINT:
        return _undo_float_predictor(data[:size], shape, dtype.itemsize)
    values = np.frombuffer(data[:size], dtype).reshape(shape).astype(page.dtype)
    if page.predictor == HORIZONTAL:
        integers = values.view(f"u{dtype.itemsize}")  # floats too
        return np.cumsum(integers, axis=1, dtype=integers.dtype).view(values.dtype)
    return values


def _unpack(data: bytes, shape: tuple[int, int, int], bits: int) -> np.ndarray:
    """Return integers of `bits` bits, of which each row begins at a byte."""
    rows, columns, samples = shape
    row_bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(rows, -1), axis=1)
    digits = row_bits[:, : columns * samples * bits].reshape(*shape, bits)
    return digits @ (1 << np.arange(bits)[::-1])


def _undo_float_predictor(data: bytes, shape: tuple[int, int, int], itemsize: int) -> np.ndarray:
    """Sum the differences of bytes along each row; the upper bytes of a row come first."""
    rows, columns, samples = shape
    differences = np.frombuffer(data, np.uint8).reshape(rows, itemsize * columns, samples)
    data_bytes = np.cumsum(differences, axis=1, dtype=np.uint8)
    by_significance = data_bytes.reshape(rows, itemsize, columns * samples)
    values = np.ascontiguousarray(by_significance.swapaxes(1, 2)).view(f">f{itemsize}")
    return values.reshape(shape).astype(f"=f{itemsize}")


def _decompress(data: bytes, compression: int, size: int) -> bytes:
    """Decompress a strip or tile as a gray TIFF of one row."""
    fields = [
        (256, LONG, size),  # width
        (257, LONG, 1),  # height
        (258, SHORT, 8),  # bits per sample
        (259, SHORT, compression),
        (262, SHORT, 1),  # black is zero
        (273, LONG, 8),  # offset of the data
        (277, SHORT, 1),  # samples per pixel
        (278, LONG, 1),  # rows per strip
        (279, LONG, len(data)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in fields)
    padding = bytes(len(data) % 2)
    header = struct.pack("<4sI", b"II*\0", 8 + len(data) + len(padding))
    count = struct.pack("<H", len(fields))
    file = io.BytesIO(b"".join([header, data, padding, count, directory, bytes(4)]))
    with Image.open(file) as image:
        return image.tobytes()
