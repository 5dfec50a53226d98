"""Image decoding: bit-identical to Pillow, and an error for every corrupt file."""

import io

import numpy as np
import pytest
import tifffile
from image_helpers import encoded, noise_image, photograph, saved
from PIL import Image, ImageOps

from mae_jax.data.decode import decode
from mae_jax.data.sources import DataError


def decode_with_pillow(data, mode):
    with Image.open(io.BytesIO(data)) as image:
        array = np.asarray(image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, dict(subsampling=0), dict(progressive=True)], ids=str)
def test_jpeg_equals_pillow(mode, options):
    data = encoded(photograph().convert(mode), "JPEG", quality=91, **options)
    np.testing.assert_array_equal(decode(data, 3), decode_with_pillow(data, "RGB"))
    np.testing.assert_array_equal(decode(data, 1), decode_with_pillow(data, "L"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "TIFF"])
def test_other_formats_equal_pillow(mode, file_format):
    data = encoded(noise_image(0).convert(mode), file_format)
    np.testing.assert_array_equal(decode(data, 3), decode_with_pillow(data, "RGB"))
    np.testing.assert_array_equal(decode(data, 1), decode_with_pillow(data, "L"))


def test_alpha_is_dropped_without_compositing():
    """As in torchvision."""
    image = noise_image(0)
    transparent = image.copy()
    transparent.putalpha(0)
    np.testing.assert_array_equal(decode(encoded(transparent), 3), np.asarray(image))


def test_rgba_as_four_channels():
    image = noise_image(0).convert("RGBA")
    np.testing.assert_array_equal(decode(encoded(image), 4), np.asarray(image))


def test_16_bit_values_are_scaled_to_8_bits():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    pixels = decode(encoded(Image.fromarray(values)), 1)
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied_on_request(orientation, file_format):
    """Except for TIFF, whose orientation Pillow, and so torchvision, always applies."""
    image = noise_image(0)
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, file_format, exif=exif)
    np.testing.assert_array_equal(decode(data, 3), decode_with_pillow(data, "RGB"))
    with Image.open(io.BytesIO(data)) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode(data, 3, exif=True), upright)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_extreme_sizes(size, file_format):
    assert decode(encoded(noise_image(0, size), file_format), 3).shape == (*size, 3)


def decompression_bomb(file_format):
    """A small file of 20,000 x 20,000 white pixels."""
    mode = "1" if file_format == "PNG" else "L"
    return encoded(Image.new(mode, (20_000, 20_000), 1), file_format)


def npz_of_two_arrays():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((9, 9, 3)), b=np.zeros((9, 9, 3)))
    return buffer.getvalue()


JPEG = encoded(photograph(), "JPEG", quality=91)
BAD = {
    "empty": (b"", "it is empty"),
    "web page": (b"\n<!doctype html><html>404</html>", "it is a web page"),
    "text": (b"hello", "its bytes are not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "Premature end of JPEG file"),
    "JPEG without its end": (JPEG[:-100], "Premature end of JPEG file"),
    "20 bytes of a JPEG": (JPEG[:20], "its bytes are not an image"),
    "300 bytes of a JPEG": (JPEG[:300], "."),
    "half a PNG": (encoded(noise_image(0))[:300], "."),
    "PNG bomb": (decompression_bomb("PNG"), "decompression bomb"),
    "JPEG bomb": (decompression_bomb("JPEG"), "decompression bomb"),
    "32-bit gray": (encoded(Image.new("F", (4, 4)), "TIFF"), r"its shape is \[4, 4, 1\]"),
    "half a .npy": (saved(np.zeros((9, 9, 3)))[:200], "not a complete numpy file"),
    "half a .npz": (saved(np.zeros((9, 9, 3)), ".npz")[:200], "not a complete numpy file"),
    "two arrays": (npz_of_two_arrays(), "it has the arrays a, b, but none called 'image'"),
    "pickled": (saved(np.array([{}], object)), "not a complete numpy file of numbers"),
    "two channels": (saved(np.zeros((9, 9, 2))), r"its shape is \[9, 9, 2\], but .*channels=3"),
    "no pixels": (saved(np.zeros((0, 9, 3))), r"its shape is \[0, 9, 3\]"),
    "NaN": (saved(np.full((9, 9, 3), np.nan)), "it contains NaN or Inf"),
    "Inf": (saved(np.full((9, 9, 3), np.inf)), "it contains NaN or Inf"),
    "strings": (saved(np.full((9, 9, 3), "a")), "its dtype is <U1, which is not numeric"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_a_data_error_with_a_reason(name):
    data, message = BAD[name]
    with pytest.raises(DataError, match=message):
        decode(data, 3)


def test_extraneous_bytes_before_the_end_marker_are_ignored():
    padded = JPEG[:-2] + b"\x11\x22\x33" + JPEG[-2:]
    np.testing.assert_array_equal(decode(padded, 3), decode_with_pillow(JPEG, "RGB"))


def test_corruption_that_pillow_ignores_is_detected():
    corrupt = bytearray(JPEG)
    corrupt[len(JPEG) // 2 : len(JPEG) // 2 + 200] = bytes(200)
    decode_with_pillow(bytes(corrupt), "RGB")  # garbage without an error
    with pytest.raises(DataError, match="Corrupt JPEG data"):
        decode(bytes(corrupt), 3)


CHANNELS = np.random.default_rng(0).integers(0, 60_000, (12, 10, 5), dtype=np.uint16)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, photometric="minisblack", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(CHANNELS),
        saved(CHANNELS, ".npz"),
        saved(CHANNELS.transpose(2, 0, 1)),
        saved(CHANNELS.astype(">u2")),
        tiff(CHANNELS.transpose(2, 0, 1)),
        tiff(CHANNELS, planarconfig="contig"),
        tiff(CHANNELS.transpose(2, 0, 1), planarconfig="separate"),
        tiff(CHANNELS.transpose(2, 0, 1), compression="zlib"),
    ],
    ids=["npy", "npz", "channels first", "big-endian", "pages", "samples", "planes", "zlib"],
)
def test_multichannel_files_keep_their_values(data):
    pixels = decode(data, 5)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels, CHANNELS)
    with pytest.raises(DataError, match=r"its shape is \["):
        decode(data, 4)


def test_three_tiff_pages_are_three_channels():
    pages = tiff(CHANNELS[..., :3].transpose(2, 0, 1))
    np.testing.assert_array_equal(decode(pages, 3), CHANNELS[..., :3])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_other_dtypes_become_float32(dtype):
    values = CHANNELS.astype(dtype) / dtype(8) if dtype != np.int32 else CHANNELS.astype(dtype)
    pixels = decode(saved(values), 5)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, values)


def test_array_without_a_channel_axis_is_gray():
    assert decode(np.zeros((4, 4), np.uint8), 1).shape == (4, 4, 1)


FILES = {name: encoded(noise_image(0), name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}
FILES |= {"TIFF": encoded(noise_image(0), "TIFF", compression="tiff_lzw")}
FILES |= {"TIFF pages": tiff(CHANNELS[..., :3].transpose(2, 0, 1))}
FILES |= {".npy": saved(CHANNELS[..., :3]), ".npz": saved(CHANNELS[..., :3], ".npz")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_random_corruption_gives_an_image_or_a_data_error(name):
    rng, errors = np.random.default_rng(0), 0
    for _ in range(150):
        corrupt = bytearray(FILES[name])
        for position in rng.integers(0, min(len(corrupt), 200), rng.integers(1, 6)):
            corrupt[position] = rng.integers(0, 256)
        try:
            pixels = decode(bytes(corrupt[: rng.integers(1, 2 * len(corrupt))]), 3)
            assert pixels.shape[-1] == 3
        except DataError:
            errors += 1
    assert errors > 10


def test_palette_with_transparent_colors():
    """Pillow warns of them if they are converted to RGB at once; warnings are errors here."""
    colors = noise_image(0).convert("RGB").quantize(32)
    alphas = bytes(range(0, 256, 8))
    data = encoded(colors, "PNG", transparency=alphas)
    expected = np.asarray(colors.convert("RGB"))
    np.testing.assert_array_equal(decode(data, 3), expected)
    np.testing.assert_array_equal(decode(data, 1)[..., 0], np.asarray(colors.convert("L")))
    np.testing.assert_array_equal(decode(data, 4)[..., :3], expected)
    alpha = np.frombuffer(alphas, np.uint8)[np.asarray(colors)]
    np.testing.assert_array_equal(decode(data, 4)[..., 3], alpha)
