"""Pixels without data: found, named with their share, and left out of statistics on request."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile

from mae_jax.data.__main__ import main
from mae_jax.data.decode import decode_masked
from mae_jax.data.sources import DataError

IMAGE = np.arange(8 * 8 * 4, dtype=np.float32).reshape(8, 8, 4) % 200


def tiff(array: np.ndarray, nodata: str | None) -> bytes:
    """Return a TIFF with GDAL's tag of NoData, as text."""
    tags = [(42113, "s", 0, nodata, True)] if nodata is not None else []
    file = io.BytesIO()
    color = "rgb" if array.shape[-1] == 3 and array.dtype == np.uint8 else "minisblack"
    tifffile.imwrite(file, array, photometric=color, planarconfig="contig", extratags=tags)
    return file.getvalue()


def with_missing(value: float, dtype: str = "float32", channels: int = 4) -> np.ndarray:
    """Return an image of which half of channel 1 has a value, and nothing else has."""
    image = (1 + IMAGE[..., :channels]).astype(dtype)
    image[:4, :, 1] = value
    return image


def folder(path: Path, files: dict[str, bytes]) -> str:
    for name, encoded in files.items():
        (path / name).write_bytes(encoded)
    return str(path)


@pytest.mark.parametrize(
    ("value", "text", "dtype", "channels"),
    [
        (-9999, "-9999", "float32", 4),
        (-9999, "-9999", "int16", 4),
        (0, "0", "uint16", 4),
        (0, "0", "uint8", 3),
        (255, "255.0", "uint8", 4),
        (-3.4028234663852886e38, "-3.4028234663852886e+38", "float32", 4),
        (-3.4028234663852886e38, "-3.40282346638529e+38", "float32", 4),
        (np.nan, "nan", "float32", 4),
        (np.nan, None, "float32", 4),
    ],
)
def test_missing_samples_are_found_by_channel(value, text, dtype, channels, caplog):
    image = with_missing(value, dtype, channels)
    masked = decode_masked(tiff(image, text), channels)
    assert not caplog.records
    expected = np.zeros(image.shape, bool)
    expected[:4, :, 1] = True
    np.testing.assert_array_equal(masked.missing, expected)
    np.testing.assert_array_equal(masked.pixels[~expected], image[~expected])


@pytest.mark.parametrize("value", [-9999, np.nan])
def test_a_rotated_tiff_has_its_mask_rotated(value):
    image = with_missing(value)[:6]
    file = io.BytesIO()
    tags = [(42113, "s", 0, str(value), True), (274, "H", 1, 6, True)]
    tifffile.imwrite(file, image, photometric="minisblack", planarconfig="contig", extratags=tags)
    masked = decode_masked(file.getvalue(), 4)
    expected = np.rot90(image, -1)
    np.testing.assert_array_equal(masked.missing, np.isnan(expected) | (expected == value))
    np.testing.assert_array_equal(masked.pixels[~masked.missing], expected[~masked.missing])


def test_nan_of_arrays_is_found_with_channels_first():
    file = io.BytesIO()
    np.save(file, np.moveaxis(with_missing(np.nan), -1, 0))
    assert decode_masked(file.getvalue(), 4).missing.sum(axis=(0, 1)).tolist() == [0, 32, 0, 0]


@pytest.mark.parametrize("text", ["-9999", "nan", "3.5", "none"])
def test_a_value_that_no_sample_can_have_masks_nothing(text):
    assert not decode_masked(tiff(IMAGE.astype(np.uint8), text), 4).missing.any()


@pytest.mark.parametrize("nodata", ["-9999", "nan"])
def test_check_names_nodata_with_its_share(tmp_path, capsys, monkeypatch, nodata):
    monkeypatch.setenv("COLUMNS", "200")
    files = {"a.tif": tiff(with_missing(-9999), nodata), "b.tif": tiff(1 + IMAGE, None)}
    files["c.tif"] = tiff(1 + IMAGE, nodata)
    main(["check", folder(tmp_path, files), "--channels", "4"])
    output = capsys.readouterr().out
    if nodata == "nan":
        assert "NoData nan (2 files); no pixel has it" in output
    else:
        assert "NoData -9999 (2 files); 16.7 % of all pixels" in output
        assert "by channel 0 %, 16.7 %, 0 %, 0 %" in output


def test_check_lists_an_image_with_nan_and_its_share(tmp_path, capsys):
    data = folder(tmp_path, {"a.tif": tiff(with_missing(np.nan), None)})
    with pytest.raises(SystemExit):
        main(["check", data, "--channels", "4"])
    assert "a.tif: it contains NaN or Inf, 12.5 % of its values: replace" in capsys.readouterr().out


@pytest.mark.parametrize("value", [-9999, np.nan])
def test_stats_leave_out_nodata_on_request(tmp_path, capsys, value):
    image = with_missing(value)
    data = folder(tmp_path, {"a.tif": tiff(image, str(value))})
    main(["stats", data, "--channels", "4", "--ignore-nodata"])
    output = capsys.readouterr().out
    valid = [image[..., 0], image[4:, :, 1], image[..., 2], image[..., 3]]
    assert f"data.mean='({', '.join(f'{x.mean():.6g}' for x in valid)},)'" in output
    assert f"data.std='({', '.join(f'{x.std():.6g}' for x in valid)},)'" in output
    assert "left out" in output


def test_stats_say_that_nodata_is_counted(tmp_path, capsys):
    main(["stats", folder(tmp_path, {"a.tif": tiff(with_missing(-9999), "-9999")}), "--channels=4"])
    assert "50 % of all pixels" in (output := capsys.readouterr().out)
    assert "--ignore-nodata omits them" in output


def test_stats_name_an_image_with_nan_and_the_remedy(tmp_path):
    data = folder(tmp_path, {"a.tif": tiff(with_missing(np.nan), None)})
    with pytest.raises(DataError, match=r"a\.tif.*NaN.*--ignore-nodata"):
        main(["stats", data, "--channels", "4"])


@pytest.mark.parametrize("photometric", ["miniswhite", "palette"])
def test_nodata_is_compared_with_stored_values(photometric):
    stored = np.full((8, 10), 7, np.uint8)
    stored[:2] = 0
    options: dict = {"photometric": photometric, "extratags": [(42113, "s", 0, "0", True)]}
    if photometric == "palette":
        options["colormap"] = np.arange(768, dtype=np.uint16).reshape(3, 256)
    file = io.BytesIO()
    tifffile.imwrite(file, stored, metadata=None, **options)
    masked = decode_masked(file.getvalue(), 3)
    np.testing.assert_array_equal(masked.missing.all(axis=-1), stored == 0)
    assert masked.missing.shape == masked.pixels.shape


def test_nodata_of_colors_that_are_read_as_gray():
    image = np.full((8, 10, 3), 700, np.uint16)
    image[:2, :, 1] = 0
    file = io.BytesIO()
    tags = [(42113, "s", 0, "0", True)]
    tifffile.imwrite(file, image, photometric="rgb", metadata=None, extratags=tags)
    masked = decode_masked(file.getvalue(), 1)
    np.testing.assert_array_equal(masked.missing[..., 0], image[..., 1] == 0)


@pytest.mark.parametrize(("value", "option"), [(-9999, "-9999"), (np.nan, "nan")])
def test_commands_take_a_value_as_training_does(tmp_path, capsys, monkeypatch, value, option):
    monkeypatch.setenv("COLUMNS", "200")
    image = with_missing(value)
    data = folder(tmp_path, {"a.tif": tiff(image, None)})
    main(["check", data, "--channels", "4", "--nodata", option])
    assert "50 % of all pixels" in capsys.readouterr().out
    main(["stats", data, "--channels", "4", "--nodata", option])
    output = capsys.readouterr().out
    valid = [image[..., 0], image[4:, :, 1], image[..., 2], image[..., 3]]
    assert f"data.mean='({', '.join(f'{x.mean():.6g}' for x in valid)},)'" in output
    assert f"--config.data.nodata={option}" in output
