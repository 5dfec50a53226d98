"""PNGs with long texts and color profiles, and files that are something else than an image."""

import struct
import zlib

import numpy as np
import pytest
from image_helpers import encoded, noise_image
from PIL import Image, PngImagePlugin

from mae_jax.convert.preprocessing import _flatten_on_white
from mae_jax.data.decode import decode, exif_orientation
from mae_jax.data.downscale import DownscaleJpeg
from mae_jax.data.sources import DataError

IMAGE = noise_image(0)
PIXELS = np.asarray(IMAGE)
PLAIN = encoded(IMAGE)
LONG = b"x" * 3 * 2**20
BOMB = zlib.compress(bytes(2**28), 9)  # 256 MiB of text in 0.25 MiB


def with_chunk(kind, content, before=b"IDAT", data=PLAIN):
    """Insert a chunk into a PNG, before the first one of a type."""
    where = data.index(before) - 4
    chunk = struct.pack(">I", len(content)) + kind + content
    return data[:where] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + data[where:]


NOTES = {
    "tEXt": (b"tEXt", b"Comment\0" + LONG),
    "zTXt": (b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "iTXt": (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG)),
    "iTXt, not compressed": (b"iTXt", b"Comment\0\0\0\0\0" + LONG),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "EXIF as text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    "ICC": (b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
    "ICC of another compression": (b"iCCP", b"profile\0\7" + LONG[:99]),
    "bomb of text": (b"zTXt", b"Comment\0\0" + BOMB),
    "bomb of XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "bomb of ICC": (b"iCCP", b"profile\0\0" + BOMB),
    "no zlib data": (b"zTXt", b"Comment\0\0" + b"not compressed"),
}


@pytest.mark.parametrize("name", NOTES)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_notes_are_ignored(name, before):
    data = with_chunk(*NOTES[name], before)
    for exif in (False, True):
        np.testing.assert_array_equal(decode(data, 3, exif=exif), PIXELS)
    assert DownscaleJpeg(3, 8, 90)(data) == DownscaleJpeg(3, 8, 90)(PLAIN)


def test_many_long_notes_together():
    data = PLAIN
    for _ in range(40):
        data = with_chunk(*NOTES["zTXt"], data=data)
    np.testing.assert_array_equal(decode(data, 3), PIXELS)


def test_notes_of_16_bit_and_transparent_images():
    gray = np.arange(60, dtype=np.uint16).reshape(6, 10) * 1000
    data = with_chunk(*NOTES["iTXt"], data=encoded(Image.fromarray(gray)))
    np.testing.assert_array_equal(decode(data, 1)[..., 0], gray // 257)
    np.testing.assert_array_equal(decode(data, 1, bit_depth=16)[..., 0] * 65535, gray)
    transparent = IMAGE.copy()
    transparent.putalpha(0)
    data = with_chunk(*NOTES["XMP"], data=encoded(transparent))
    assert (_flatten_on_white(data) == 255).all()


def test_the_orientation_in_short_notes_counts():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    assert exif_orientation(data) == 6
    assert decode(data, 3, exif=True).shape == (PIXELS.shape[1], PIXELS.shape[0], 3)
    exif = IMAGE.getexif()
    exif[0x0112] = 8
    data = with_chunk(*NOTES["bomb of text"], data=encoded(IMAGE, exif=exif))
    assert exif_orientation(data) == 8


def test_limits_of_pillow_are_not_changed():
    decode(with_chunk(*NOTES["zTXt"]), 3)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 2**20
    assert PngImagePlugin.MAX_TEXT_MEMORY == 64 * 2**20


def ftyp(brand):
    return b"\0\0\0\x18ftyp" + brand + bytes(20)


NOT_READ = {
    "HEIC": (ftyp(b"heic"), "it is a HEIC picture, which is not supported: convert it to PNG"),
    "video": (ftyp(b"isom"), "it is a video"),
    "JPEG XL": (b"\xff\x0a" + bytes(20), "a JPEG XL picture"),
    "EXR": (b"v/1\x01" + bytes(20), "an OpenEXR picture"),
    "DICOM": (bytes(128) + b"DICM", "it is a DICOM file without an image"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 or NetCDF file"),
    "GRIB": (b"GRIB" + bytes(3) + b"\1" + bytes(20), "a GRIB file"),
    "PDF": (b"%PDF-1.7\n", "a PDF document"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "a gzip archive: unpack it"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="..."/>', r"a drawing \(SVG\)"),
    "HTML": (b"<html>", "a web page or other markup"),
    "damaged PNG": (PLAIN[:9] + bytes(20), "."),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_other_files_are_called_by_their_name(kind):
    data, message = NOT_READ[kind]
    with pytest.raises(DataError, match=message) as caught:
        decode(data, 3)
    assert "bytes are not an image" not in str(caught.value)


def test_exif_that_cannot_be_read_is_upright():
    for before in (b"IDAT", b"IEND"):
        data = with_chunk(b"eXIf", b"garbage", before)
        np.testing.assert_array_equal(decode(data, 3, exif=True), PIXELS)


def test_gray_and_alpha_of_16_bits_as_two_channels():
    values = np.random.default_rng(0).integers(0, 2**16, (9, 7, 2), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 7, 9, 16, 4, 0, 0, 0)
    data = PLAIN[:8]
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + checksum
    np.testing.assert_array_equal(decode(data, 2), values >> 8)
