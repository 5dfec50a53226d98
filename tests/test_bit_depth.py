"""Pictures of 9 to 16 bits: none of their levels is lost in silence."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from image_helpers import encoded, noise_image, saved
from PIL import Image
from run_helpers import save_first_state
from test_data_runs import config_of

import mae_jax
from mae_jax.data import __main__ as data
from mae_jax.data import bit_depth
from mae_jax.data.decode import decode, used_bits
from mae_jax.data.factory import DatasetSpec
from mae_jax.data.in_memory import InMemory
from mae_jax.data.sources import DataError, FileSource
from mae_jax.data.validation import channel_stats
from mae_jax.train.build_sources import make_train_source

SIZE = 64, 65


def ramp(bits, channels=1):
    values = np.linspace(0, 2**bits - 1, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(*SIZE, 1)
    return np.concatenate([np.roll(values, 7 * i, axis=1) for i in range(channels)], axis=-1)


def chunk(kind, content):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(array):
    """Return a PNG of uint16 [h, w, c], whose rows use all five filters."""
    height, width, channels = array.shape
    rows = array.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    left = np.pad(rows, ((0, 0), (2 * channels, 0)))[:, : rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:height]
    corner = np.pad(up, ((0, 0), (2 * channels, 0)))[:, : rows.shape[1]]
    distances = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
    paeth = np.choose(np.argmin(distances, axis=0), [left, up, corner])
    predictions = [0 * rows, left, up, (left + up) // 2, paeth]
    lines = b"".join(
        bytes([y % 5]) + ((rows[y] - predictions[y % 5][y]) % 256).astype(np.uint8).tobytes()
        for y in range(height)
    )
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
    body = zlib.compress(lines)
    half = len(body) // 2
    parts = chunk(b"IDAT", body[:half]) + chunk(b"IDAT", body[half:])
    return b"\x89PNG\r\n\x1a\n" + header + parts + chunk(b"IEND", b"")


def tiff(array):
    photometric = "rgb" if array.shape[-1] >= 3 else "minisblack"
    squeezed = array.squeeze(-1) if array.shape[-1] == 1 else array
    tifffile.imwrite(buffer := io.BytesIO(), squeezed, photometric=photometric)
    return buffer.getvalue()


FORMATS = {"PNG": png, "TIFF": tiff, ".npy": saved}


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_bit_depth_keeps_all_levels_as_fractions(bits, channels, name):
    array = ramp(bits, channels)
    pixels = decode(FORMATS[name](array), channels, bit_depth=bits)
    assert pixels.dtype == np.float32
    assert pixels.min() == 0
    assert pixels.max() == 1
    np.testing.assert_array_equal(np.rint(pixels * (2**bits - 1)).astype(np.uint16), array)


@pytest.mark.parametrize("samples", [2, 4])
def test_alpha_of_16_bits(samples):
    array = ramp(12, samples)
    pixels = decode(png(array), samples - 1, bit_depth=12)
    np.testing.assert_array_equal(pixels, array[..., :-1].astype(np.float32) / 4095)
    np.testing.assert_array_equal(
        decode(png(array), samples, bit_depth=12), array.astype(np.float32) / 4095
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_without_bit_depth_pictures_equal_pillow(channels):
    data = png(ramp(16, channels))
    with Image.open(io.BytesIO(data)) as image:
        image = image if image.mode != "I;16" else Image.fromarray(np.asarray(image) // 257)
        for mode, wanted in (("L", 1), ("RGB", 3)):
            expected = np.asarray(image.convert(mode)).reshape(*SIZE, wanted)
            np.testing.assert_array_equal(decode(data, wanted), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_and_rgb_are_converted_into_each_other(kind):
    gray, rgb = ramp(12), ramp(12, 3)
    repeated = decode(FORMATS[kind](gray), 3, bit_depth=12)
    np.testing.assert_array_equal(repeated, np.repeat(gray, 3, -1).astype(np.float32) / 4095)
    luma = decode(FORMATS[kind](rgb), 1, bit_depth=12)
    expected = rgb @ np.array([[0.299], [0.587], [0.114]]) / 4095
    np.testing.assert_allclose(luma, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_8_bit_files_become_fractions_of_255(kind):
    data = encoded(noise_image(0), kind)
    expected = decode(data, 3).astype(np.float32) / 255
    np.testing.assert_array_equal(decode(data, 3, bit_depth=12), expected)


def test_bands_and_arrays_become_fractions_and_floats_are_left():
    bands = ramp(12, 5)
    expected = bands.astype(np.float32) / 4095
    np.testing.assert_array_equal(decode(saved(bands), 5, bit_depth=12), expected)
    np.testing.assert_array_equal(decode(bands, 5, bit_depth=12), expected)
    np.testing.assert_array_equal(decode(expected, 5, bit_depth=12), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_values_above_the_bit_depth_are_bad(name):
    message = "its largest value, 4095, has 12 bits, more than data.bit_depth=11"
    with pytest.raises(DataError, match=message):
        decode(FORMATS[name](ramp(12)), 1, bit_depth=11)


@pytest.mark.parametrize("bits", [9, 12, 15, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_used_bits_of_what_is_read_with_8_bits(bits, channels):
    for kind in ("PNG", "TIFF"):
        assert used_bits(FORMATS[kind](ramp(bits, channels)), channels) == (bits, 16)
    for file in (saved(ramp(bits)), encoded(noise_image(0)), encoded(noise_image(0), "TIFF")):
        assert used_bits(file, channels) is None
    assert used_bits(tiff(ramp(bits, 5)), 5) is None  # bands keep their values


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "validation"):
        for label in "ab":
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(4):
                array = np.roll(ramp(12), 9 * i, axis=1)
                (tmp_path / "set" / split / label / f"{i}.png").write_bytes(png(array))
    return tmp_path / "set"


def test_check_and_stats_name_the_bits(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    data.main(["check", str(folder), "--channels", "1"])
    out = capsys.readouterr().out
    assert "8: values use 12 of 16 bits, but are read with 8 bits: 16 of 4,096 gray levels" in out
    assert "data.bit_depth=12 keeps all levels" in out
    data.main(["check", str(folder), "--channels", "1", "--bit-depth", "12"])
    assert "levels are left" not in capsys.readouterr().out
    data.main(["stats", str(folder), "--channels", "1", "--bit-depth", "12"])
    assert "--config.data.mean='(0.499" in capsys.readouterr().out


def test_check_names_the_bits_of_arrays(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "a.npy").write_bytes(saved(ramp(12)))
    data.main(["check", str(tmp_path), "--channels", "1"])
    assert "use 12 of 16 bits; all levels are kept" in capsys.readouterr().out


def test_cache_scales_the_range_to_8_bits(folder, tmp_path, capsys):
    options = ["--channels", "1", "--bit-depth", "12", "--quality", "100"]
    data.main(["cache", str(folder), str(tmp_path / "copy"), *options])
    source = DatasetSpec("tfds", "set_320", str(tmp_path / "copy")).open("train")
    pixels = decode(source[0]["image"], 1)
    assert pixels.min() < 5
    assert pixels.max() > 250


def test_statistics_and_memory_agree_with_the_files(folder):
    files = FileSource([folder / "train" / "a"])
    memory = InMemory(files, 1, bit_depth=12)
    for index in range(len(files)):
        expected = decode(files[index]["image"], 1, bit_depth=12)
        np.testing.assert_array_equal(decode(memory[index]["image"], 1, bit_depth=12), expected)
    assert channel_stats(files, 1, 1, bit_depth=12).mean[0] == pytest.approx(0.5, abs=1e-2)


RUN = dict(model__channels=1, data__mean=(0.5,), data__std=(0.3,), steps=3, batch_size=8)


@pytest.mark.parametrize("depth", [None, 12])
def test_the_log_says_once_what_a_run_loses(depth, folder, tmp_path, caplog):
    bit_depth._log_once.cache_clear()
    config = config_of(folder, data__bit_depth=depth, **RUN)
    for _ in range(2):
        make_train_source(config, tmp_path)
    said = [message for message in caplog.messages if "16 of 4,096 gray levels" in message]
    assert len(said) == (depth is None)


def test_the_model_of_a_run_reads_images_as_the_run(folder, tmp_path):
    config = config_of(folder, data__bit_depth=12)
    save_first_state(config, tmp_path / "run")
    model, params = mae_jax.load(tmp_path / "run")
    images = model.read_images(folder / "train" / "a")
    assert images.dtype == np.float32
    assert len(np.unique(images)) > 256
    assert np.isfinite(model.features(params, images)["mean"]).all()
    with pytest.raises(ValueError, match="images are uint16"):
        model.features(params, (4095 * images).astype(np.uint16))
