"""What files hold in the wild, and what becomes of each."""

import io

import numpy as np
import pytest
import tifffile
from image_helpers import encoded, noise_image, photograph, saved
from PIL import Image, ImageOps

from mae_jax.data.decode import decode
from mae_jax.data.sources import DataError


def by_pillow(data, mode):
    with Image.open(io.BytesIO(data)) as image:
        array = np.asarray(image.convert(mode))
    return array.reshape(*array.shape[:2], -1)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, dict(subsampling=0), dict(progressive=True)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_are_pillows_to_the_bit(mode, options, channels):
    data = encoded(photograph().convert(mode), "JPEG", quality=91, **options)
    expected = by_pillow(data, {1: "L", 3: "RGB"}[channels])
    np.testing.assert_array_equal(decode(data, channels), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_other_pictures_are_pillows(mode, kind):
    data = encoded(noise_image(0).convert(mode), kind)
    np.testing.assert_array_equal(decode(data, 3), by_pillow(data, "RGB"))
    np.testing.assert_array_equal(decode(data, 1), by_pillow(data, "L"))


def test_alpha_is_dropped_as_torchvision_drops_it():
    image = noise_image(0)
    clear = image.copy()
    clear.putalpha(0)
    np.testing.assert_array_equal(decode(encoded(clear), 3), np.asarray(image))


def test_16_bits_are_scaled_to_8():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    found = decode(encoded(Image.fromarray(values)), 1)
    np.testing.assert_array_equal(found[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_turns_only_if_asked(orientation, kind):
    """But of TIFF, which Pillow, and so torchvision, always turns."""
    image = photograph()
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    np.testing.assert_array_equal(decode(data, 3), by_pillow(data, "RGB"))
    with Image.open(io.BytesIO(data)) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode(data, 3, exif=True), upright)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_any_size(size, kind):
    assert decode(encoded(noise_image(0, size), kind), 3).shape == (*size, 3)


def bomb(kind):
    """20,000 x 20,000 white pixels in a small file."""
    return encoded(Image.new("1" if kind == "PNG" else "L", (20_000, 20_000), 1), kind)


def two_arrays():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros((9, 9, 3)), b=np.zeros((9, 9, 3)))
    return buffer.getvalue()


JPEG = encoded(photograph(), "JPEG", quality=91)
BAD = {
    "empty": (b"", "it is empty"),
    "web page": (b"\n<!doctype html><html>404</html>", "web page"),
    "text": (b"hello", "its bytes are not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "Premature end of JPEG file"),
    "a JPEG without its end": (JPEG[:-100], "Premature end of JPEG file"),
    "a JPEG's first bytes": (JPEG[:20], "its bytes are not an image"),
    "a JPEG's first tables": (JPEG[:300], "."),
    "half a PNG": (encoded(noise_image(0))[:300], "."),
    "a bomb of a PNG": (bomb("PNG"), "decompression bomb"),
    "a bomb of a JPEG": (bomb("JPEG"), "decompression bomb"),
    "32-bit grey": (encoded(Image.new("F", (4, 4)), "TIFF"), "32-bit numbers"),
    "half a .npy": (saved(np.zeros((9, 9, 3)))[:200], "no whole numpy file"),
    "half a .npz": (saved(np.zeros((9, 9, 3)), ".npz")[:200], "no whole numpy file"),
    "two arrays": (two_arrays(), "it has the arrays a, b: one has to be called 'image'"),
    "pickled": (saved(np.array([{}], object)), "."),
    "too few channels": (saved(np.zeros((9, 9, 2))), r"its shape is \[9, 9, 2\]"),
    "no pixels": (saved(np.zeros((0, 9, 3))), r"its shape is \[0, 9, 3\]"),
    "NaN": (saved(np.full((9, 9, 3), np.nan)), "not finite"),
    "words": (saved(np.full((9, 9, 3), "a")), "not of numbers"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_bad_says_why(what):
    data, message = BAD[what]
    with pytest.raises(DataError, match=message):
        decode(data, 3)


def test_bytes_too_many_at_the_end_are_no_damage():
    padded = JPEG[:-2] + b"\x11\x22\x33" + JPEG[-2:]
    np.testing.assert_array_equal(decode(padded, 3), by_pillow(JPEG, "RGB"))


def test_damage_that_pillow_does_not_see():
    damaged = bytearray(JPEG)
    damaged[len(JPEG) // 2 : len(JPEG) // 2 + 200] = bytes(200)
    by_pillow(bytes(damaged), "RGB")  # garbage without a word
    with pytest.raises(DataError, match="Corrupt JPEG data"):
        decode(bytes(damaged), 3)


STACK = np.random.default_rng(0).integers(0, 60_000, (12, 10, 5), dtype=np.uint16)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(STACK),
        saved(STACK, ".npz"),
        saved(STACK.transpose(2, 0, 1)),
        saved(STACK.astype(">u2")),
        tiff(STACK.transpose(2, 0, 1), photometric="minisblack"),  # pages
        tiff(STACK, planarconfig="contig", photometric="minisblack"),
        tiff(STACK.transpose(2, 0, 1), planarconfig="separate", photometric="minisblack"),
        tiff(STACK.transpose(2, 0, 1), photometric="minisblack", compression="zlib"),
    ],
    ids=["npy", "npz", "channels first", "big-endian", "pages", "samples", "planes", "zlib"],
)
def test_stacks_of_channels_keep_their_values(data):
    found = decode(data, 5)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, STACK)
    with pytest.raises(DataError, match=r"its shape is \["):
        decode(data, 4)


def test_three_pages_are_three_channels():
    pages = tiff(STACK[..., :3].transpose(2, 0, 1), photometric="minisblack")
    np.testing.assert_array_equal(decode(pages, 3), STACK[..., :3])


def test_arrays_of_other_numbers_become_float32():
    for kind in (np.float16, np.float64, np.int32):
        found = decode(saved(STACK.astype(kind) // 7), 5)
        assert found.dtype == np.float32
    assert decode(np.zeros((4, 4), np.uint8), 1).shape == (4, 4, 1)


def test_rgba_as_four_channels():
    image = noise_image(0).convert("RGBA")
    np.testing.assert_array_equal(decode(encoded(image), 4), np.asarray(image))


FILES = {kind: encoded(noise_image(0), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}
FILES |= {"TIFF": encoded(noise_image(0), "TIFF", compression="tiff_lzw")}
FILES |= {"stack": tiff(STACK[..., :3].transpose(2, 0, 1), photometric="minisblack")}
FILES |= {".npy": saved(STACK[..., :3]), ".npz": saved(STACK[..., :3], ".npz")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_whatever_the_damage_it_is_an_image_or_an_error_of_data(kind):
    rng, bad = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(FILES[kind])
        for place in rng.integers(0, min(len(damaged), 200), rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode(bytes(damaged[: rng.integers(1, 2 * len(damaged))]), 3).shape[-1] == 3
        except DataError:
            bad += 1
    assert bad > 10
