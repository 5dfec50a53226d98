"""TIFFs of every kind: read as photographs or as bands, or refused with what they are."""

import importlib.util
import io
import re
import struct

import numpy as np
import pytest
import tifffile
from image_helpers import encoded
from PIL import Image

from mae_jax.data.decode import decode
from mae_jax.data.sources import DataError

RNG = np.random.default_rng(0)
RGB16 = RNG.integers(0, 2**16, (36, 40, 3), dtype=np.uint16)
RGB8 = (RGB16 >> 8).astype(np.uint8)
BANDS = RNG.integers(0, 60_000, (36, 40, 5), dtype=np.uint16)


def tiff(array, *, planar=False, **options):
    """Return a TIFF of an array [h, w, c], or of one page [h, w]."""
    options = {"photometric": "rgb", "metadata": None} | options
    if array.ndim == 3:
        options["planarconfig"] = "separate" if planar else "contig"
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(array, -1, 0) if planar else array, **options)
    return buffer.getvalue()


def bands(array, **options):
    return tiff(array, **{"photometric": "minisblack"} | options)


def pages(*arrays):
    """Return a TIFF of (array, options) per page."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for array, options in arrays:
            file.write(array, **{"metadata": None, "contiguous": False} | options)
    return buffer.getvalue()


def overwritten(data, **tags):
    with tifffile.TiffFile(buffer := io.BytesIO(data), mode="r+") as file:
        for name, value in tags.items():
            file.pages[0].tags[name].overwrite(value)
        return buffer.getvalue()


LAYOUTS = {
    "pixels": {},
    "planes": dict(planar=True),
    "planes, big-endian": dict(planar=True, byteorder=">"),
    "planes, strips": dict(planar=True, rowsperstrip=8),
    "planes, tiles": dict(planar=True, tile=(16, 32)),
    "planes, deflate": dict(planar=True, compression="zlib"),
    "planes, BigTIFF": dict(planar=True, bigtiff=True),
    "big-endian": dict(byteorder=">"),
    "big-endian BigTIFF": dict(byteorder=">", bigtiff=True),
    "tiles": dict(tile=(16, 32)),
    "deflate and predictor": dict(compression="zlib", predictor=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [False, True])
def test_rgb_of_16_bits_in_every_layout(layout, alpha):
    array, options = RGB16, LAYOUTS[layout]
    if alpha:
        array = np.concatenate([array, RGB16[..., :1]], axis=-1)
        options = options | {"extrasamples": ["unassalpha"]}
    data = tiff(array, **options)
    np.testing.assert_array_equal(decode(data, 3), RGB8)
    gray = np.asarray(Image.fromarray(RGB8).convert("L"))
    np.testing.assert_array_equal(decode(data, 1)[..., 0], gray)
    if alpha:
        np.testing.assert_array_equal(decode(data, 4), array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rgb_of_8_bits_in_every_layout(layout):
    np.testing.assert_array_equal(decode(tiff(RGB8, **LAYOUTS[layout]), 3), RGB8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_bands_of_every_dtype_keep_their_values(layout, dtype, channels):
    array = BANDS[..., :channels].astype(dtype)
    data = bands(array.squeeze(-1) if channels == 1 else array, **one_band(layout, channels, dtype))
    pixels = decode(data, channels)
    if channels == 1 and dtype == "u2":
        np.testing.assert_array_equal(pixels, array // 257)  # a picture
    else:
        assert pixels.dtype == (np.dtype(dtype) if dtype in ("u1", "u2") else np.float32)
        np.testing.assert_array_equal(pixels, array.astype(np.float32))


def one_band(layout, channels, dtype):
    options = dict(LAYOUTS[layout])
    if channels == 1:
        options.pop("planar", None)
    if np.dtype(dtype).kind == "f":
        options.pop("predictor", None)
    return options


LEVELS = np.arange(36 * 40).reshape(36, 40)


def pil_bytes(data, codec):
    """Compress bytes as the only strip of a TIFF of Pillow."""
    file = encoded(Image.frombytes("L", (len(data), 1), data), "TIFF", compression=codec)
    with tifffile.TiffFile(io.BytesIO(file)) as opened:
        page = opened.pages[0]
        ((segment, *_),) = opened.filehandle.read_segments(page.dataoffsets, page.databytecounts)
    return segment


def float_differences(array):
    """Return the bytes of an array [h, w, c] before compression with predictor 3."""
    height, width, samples = array.shape
    by_value = np.ascontiguousarray(array.astype(array.dtype.newbyteorder(">"))).view(np.uint8)
    by_value = by_value.reshape(height, width * samples, array.itemsize)
    planes = by_value.swapaxes(1, 2).reshape(height, -1, samples)
    return np.diff(planes, axis=1, prepend=np.uint8(0)).tobytes()


def compressed(array, codec, number, predictor):
    """Return a TIFF of one strip with the codec of that number, which tifffile cannot write."""
    data = array.tobytes()
    if predictor == 2:
        integers = array.view(f"u{array.itemsize}")
        data = np.diff(integers, axis=1, prepend=integers.dtype.type(0)).tobytes()
    elif predictor == 3:
        data = float_differences(array)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        iter([pil_bytes(data, codec)]),
        shape=array.shape,
        dtype=array.dtype,
        compression="zlib",
        photometric="minisblack",
        planarconfig="contig",
        rowsperstrip=len(array),
        metadata=None,
        extratags=[(65000, "H", 1, predictor, True)],
    )
    predictor_tag = struct.pack("<H", 65000), struct.pack("<H", 317)  # tifffile does not write it
    return overwritten(buffer.getvalue().replace(*predictor_tag, 1), Compression=number)


@pytest.mark.parametrize(
    ("codec", "number"),
    [("tiff_lzw", 5), ("tiff_adobe_deflate", 8), ("lzma", 34925), ("zstd", 50000)],
)
@pytest.mark.parametrize(
    ("dtype", "predictor"), [("u1", 2), ("u2", 1), ("u2", 2), ("f4", 2), ("f4", 3), ("f8", 3)]
)
def test_compressed_bands_without_imagecodecs(codec, number, dtype, predictor):
    array = (BANDS / 7).astype(dtype)
    pixels = decode(compressed(array, codec, number, predictor), 5)
    np.testing.assert_array_equal(pixels, array.astype(np.float32))


@pytest.mark.parametrize("codec", ["tiff_lzw", "zstd", "tiff_adobe_deflate", "packbits", "lzma"])
def test_compressed_gray_of_16_bits(codec):
    data = encoded(Image.fromarray(RGB16[..., 0]), "TIFF", compression=codec)
    np.testing.assert_array_equal(decode(data, 1), RGB16[..., :1] // 257)


@pytest.mark.parametrize("lossless_alpha", [False, True])
def test_webp_tiles(lossless_alpha):
    image = Image.fromarray(RGB8).convert("RGBA" if lossless_alpha else "RGB")
    array = np.asarray(image)
    tile = np.zeros((48, 48, array.shape[-1]), np.uint8) + np.uint8(255)
    tile[:36, :40] = array
    webp = encoded(Image.fromarray(tile), "WEBP", lossless=True)
    buffer = io.BytesIO()
    options = dict(extrasamples=["unassalpha"]) if lossless_alpha else {}
    tifffile.imwrite(
        buffer, iter([webp]), shape=array.shape, dtype=np.uint8, compression="zlib",
        photometric="rgb", tile=(48, 48), metadata=None, **options,
    )  # fmt: skip
    data = overwritten(buffer.getvalue(), Compression=50001)
    np.testing.assert_array_equal(decode(data, 3), RGB8)


@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr", "CMYK"])
def test_jpeg_in_a_tiff(mode):
    smooth = Image.fromarray(RGB8).resize((4, 4)).resize((64, 64))
    data = encoded(smooth.convert(mode), "TIFF", compression="jpeg", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decode(data, 3), expected)


SMALL = dict(subfiletype=1)
MASK = dict(subfiletype=4, photometric="mask")
EXTRA = {
    "overview": [(RGB8[::2, ::2], dict(photometric="rgb", **SMALL))],
    "overview of the same size": [(RGB8, dict(photometric="rgb", **SMALL))],
    "mask": [(RGB8[..., 0] > 9, MASK)],
    "mask of an overview": [(RGB8[::2, ::2, 0] > 9, MASK | dict(subfiletype=5))],
    "unmarked thumbnail": [(RGB8[::2, ::2], dict(photometric="rgb"))],
}
EXTRA["all"] = [page for extra in EXTRA.values() for page in extra]
KINDS = {
    "RGB": (RGB8, dict(photometric="rgb"), 3, RGB8),
    "RGB of 16 bits": (RGB16, dict(photometric="rgb"), 3, RGB8),
    "gray": (RGB8[..., 0], dict(photometric="minisblack"), 1, RGB8[..., :1]),
    "gray as RGB": (RGB8[..., 0], dict(photometric="minisblack"), 3, RGB8[..., [0, 0, 0]]),
    "bands": (BANDS, dict(photometric="minisblack", planarconfig="contig"), 5, BANDS),
    "floats": (
        BANDS[..., :3].astype(np.float32),
        dict(photometric="minisblack", planarconfig="contig"),
        3,
        BANDS[..., :3],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", EXTRA)
def test_overviews_and_masks_change_nothing(kind, extra):
    array, options, channels, expected = KINDS[kind]
    np.testing.assert_array_equal(
        decode(pages((array, options), *EXTRA[extra]), channels), expected
    )
    marked = [page for page in EXTRA[extra] if "subfiletype" in page[1]]
    np.testing.assert_array_equal(decode(pages(*marked, (array, options)), channels), expected)


def test_pages_and_bands_of_the_same_size_are_channels():
    gray = dict(photometric="minisblack")
    data = pages((RGB8, dict(photometric="rgb")), (RGB8[..., 1], gray))
    np.testing.assert_array_equal(decode(data, 4), RGB8[..., [0, 1, 2, 1]])
    data = pages(*[(BANDS[..., band], gray) for band in range(5)])
    np.testing.assert_array_equal(decode(data, 5), BANDS)


def test_imagej_stack_in_one_page():
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(BANDS, -1, 0), imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(decode(buffer.getvalue(), 5), BANDS)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 10, 12, 14])
@pytest.mark.parametrize("channels", [1, 3])
def test_packed_bits_are_scaled_by_their_own_range(bits, channels):
    values = RNG.integers(0, 2**bits, (8, 13, channels))
    digits = values.reshape(8, -1, 1) >> np.arange(bits)[::-1] & 1
    rows = np.packbits(digits.reshape(8, -1).astype(np.uint8), axis=1)
    page = np.zeros((8, 13) if channels == 1 else (8, 13, 3), np.uint8)
    data = tiff(page, photometric="rgb" if channels == 3 else "minisblack", rowsperstrip=8)
    with tifffile.TiffFile(buffer := io.BytesIO(data), mode="r+") as file:
        tags = file.pages[0].tags
        tags[258].overwrite((bits,) * channels if channels == 3 else bits)
        tags[279].overwrite(rows.size)
        offset = len(buffer.getvalue())
        tags[273].overwrite(offset)
        data = buffer.getvalue()[:offset].ljust(offset, b"\0") + rows.tobytes()
    scaled = values * 255 // (2**bits - 1)
    expected = scaled if channels == 1 or bits < 8 else values >> (bits - 8)
    np.testing.assert_array_equal(decode(data, channels), expected)
    fractions = decode(data, channels, bit_depth=16)
    if channels == 3 or bits > 8:
        np.testing.assert_allclose(fractions, values / (2**bits - 1), rtol=1e-6)


def test_white_is_zero():
    for array in (RGB8[..., 0], RGB16[..., 0]):
        scaled = decode(tiff(array, photometric="miniswhite"), 1)[..., 0]
        full = 255 if array.dtype == np.uint8 else 65535
        np.testing.assert_array_equal(scaled, (full - array) // (full // 255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA", "YCbCr"])
def test_modes_of_8_bits_equal_pillow(mode):
    data = encoded(Image.fromarray(RGB8).convert(mode), "TIFF")
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(decode(data, 3), np.asarray(opened.convert("RGB")))


@pytest.mark.parametrize("planar", [False, True])
def test_cmyk_of_16_bits(planar):
    ink = np.concatenate([RGB16, RGB16[..., :1] // 2], axis=-1)
    expected = Image.fromarray((ink >> 8).astype(np.uint8), "CMYK").convert("RGB")
    data = tiff(ink, photometric="separated", planar=planar)
    np.testing.assert_array_equal(decode(data, 3), np.asarray(expected))


@pytest.mark.parametrize("bits", [8, 16])
def test_palette(bits):
    colormap = RNG.integers(0, 2**16, (3, 2**bits), dtype=np.uint16)
    index = RNG.integers(0, 2**bits, (9, 7)).astype(f"u{bits // 8}")
    data = tiff(index, photometric="palette", colormap=colormap)
    expected = np.moveaxis(colormap[:, index] >> 8, 0, -1)
    np.testing.assert_array_equal(decode(data, 3), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_all_kinds(orientation):
    tag = dict(extratags=[(274, "H", 1, orientation, True)])
    expected = decode(tiff(RGB8, **tag), 3)
    np.testing.assert_array_equal(decode(tiff(RGB16, planar=True, **tag), 3), expected)
    np.testing.assert_array_equal(decode(bands(RGB8, **tag), 3), expected)


def test_alpha_of_bands_is_dropped_but_bands_are_not():
    data = bands(BANDS, extrasamples=["unspecified"] * 3 + ["unassalpha"])
    np.testing.assert_array_equal(decode(data, 4), BANDS[..., :4])
    with pytest.raises(DataError, match=r"its shape is \[36, 40, 5\]"):
        decode(bands(BANDS), 4)


REFUSED = {
    "JPEG 2000": (overwritten(tiff(RGB8), Compression=34712), "JPEG2000.*'mae_jax\\[tiff\\]'"),
    "LERC bands": (overwritten(bands(BANDS), Compression=34887), "LERC.*'mae_jax\\[tiff\\]'"),
    "sensor mosaic": (
        overwritten(bands(BANDS[..., 0]), PhotometricInterpretation=32803),
        "raw mosaic of a camera",
    ),
    "complex": (bands(BANDS[..., :3].astype(np.complex64)), "complex64, which is not numeric"),
    "pages of RGB": (pages(*[(RGB8, dict(photometric="rgb"))] * 2), "its 2 pages as channels"),
    "pages of gray": (pages(*[(RGB8[..., 0], {})] * 2), "save each page as a file"),
    "bomb": (overwritten(tiff(RGB8), ImageWidth=10**6, ImageLength=10**5), "decompression bomb"),
    "four bands": (bands(BANDS[..., :4]), re.escape("its shape is [36, 40, 4]")),
    "one band of floats": (bands(BANDS[..., 0].astype(np.float32)), re.escape("[36, 40, 1]")),
    "truncated": (bands(BANDS)[: 36 * 40], "."),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_what_it_is(kind):
    data, message = REFUSED[kind]
    if "mae_jax" in message and importlib.util.find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    with pytest.raises(DataError, match=message) as caught:
        decode(data, 3)
    assert "not an image" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_full_image_below_its_thumbnail(dtype):
    image = RGB8.astype(dtype)
    options = dict(photometric="rgb", metadata=None)
    with tifffile.TiffWriter(buffer := io.BytesIO()) as file:
        file.write(image[::4, ::4], subfiletype=1, subifds=1, **options)
        file.write(image, **options)
    expected = image if dtype == "uint8" else np.zeros_like(RGB8)  # 8 of 16 bits
    np.testing.assert_array_equal(decode(buffer.getvalue(), 3), expected)


def test_tiles_that_were_not_written_have_the_value_of_nodata():
    image = np.full((64, 64), 5, np.float32)
    tags = [(42113, "s", 0, "-9999", True)]
    for codec, number in (("raw", 1), ("tiff_lzw", 5)):
        data = tiff(image, photometric="minisblack", tile=(32, 32), extratags=tags)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            segments = [data[o : o + n] for o, n in zip(*tile_positions(file))]
        written = segments[0] if number == 1 else pil_bytes(segments[0], codec)
        sparse = overwritten(
            data[: len(data) - sum(map(len, segments))] + written,
            Compression=number,
            TileByteCounts=[len(written), 0, 0, 0],
            TileOffsets=[len(data) - sum(map(len, segments)), 0, 0, 0],
        )
        expected = np.full((64, 64, 1), -9999, np.float32)
        expected[:32, :32] = 5
        np.testing.assert_array_equal(decode(sparse, 1), expected)


def tile_positions(file):
    page = file.pages[0]
    return page.dataoffsets, page.databytecounts
