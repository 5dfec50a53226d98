"""Bands of TIFFs, selected by GDAL's descriptions or by number."""

import io

import numpy as np
import pytest
import tifffile
from image_helpers import saved

from mae_jax.data.__main__ import main
from mae_jax.data.decode import decode
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sources import DataError
from mae_jax.train import recipes
from mae_jax.train.config import from_config_dict
from mae_jax.utils.errors import UserError

BANDS = np.random.default_rng(0).integers(0, 10_000, (12, 16, 5), dtype=np.uint16)
NAMES = ("B01", "B02", "B03", "B04", "Cloud (%)")


def geotiff(array=BANDS, names=NAMES, planar=False, **options):
    """Return a TIFF with band descriptions as GDAL writes them."""
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{i}" role="description">{name}</Item>'
        for i, name in enumerate(names)
        if name
    )
    text = f'<GDALMetadata>\n<Item name="DATE">2024</Item>{items}</GDALMetadata>'
    options |= {"extratags": [(42112, "s", 0, text, True)]} if names else {}
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        np.moveaxis(array, -1, 0) if planar else array,
        planarconfig="separate" if planar else "contig",
        **{"photometric": "minisblack", "metadata": None} | options,
    )
    return file.getvalue()


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("bands", "indices"),
    [
        ("B04,B03,B02", [3, 2, 1]),
        ("('B04', 'B03', 'B02')", [3, 2, 1]),
        ("(4,3,2)", [3, 2, 1]),
        ("1", [0]),
        ("Cloud (%),1", [4, 0]),
    ],
)
def test_bands_by_name_or_number(planar, bands, indices):
    array = decode(geotiff(planar=planar), len(indices), options=ReadOptions(bands=bands))
    assert array.dtype == np.uint16
    np.testing.assert_array_equal(array, BANDS[..., indices])


def test_bands_of_pages_and_of_colors_are_as_stored():
    file = io.BytesIO()
    tifffile.imwrite(file, np.moveaxis(BANDS, -1, 0), photometric="minisblack", metadata=None)
    array = decode(file.getvalue(), 2, options=ReadOptions(bands="5,1"))
    np.testing.assert_array_equal(array, BANDS[..., [4, 0]])
    colors = (BANDS[..., :3] >> 6).astype(np.uint8)
    array = decode(geotiff(colors, (), photometric="rgb"), 3, options=ReadOptions(bands="3,2,1"))
    np.testing.assert_array_equal(array, colors[..., ::-1])


def test_bands_have_nodata_of_their_own():
    array = BANDS.astype(np.float32)
    array[:3, :, 3] = -9999
    image = decode(geotiff(array), 2, options=ReadOptions(nodata="-9999", bands="B01,B04"))
    np.testing.assert_array_equal(np.isnan(image), array[..., [0, 3]] == -9999)


@pytest.mark.parametrize(
    ("names", "bands", "message"),
    [
        (NAMES, "B99", r"no band 'B99' .*its bands are 1 B01, 2 B02, 3 B03, 4 B04, 5 Cloud \(%\)"),
        (NAMES, "6", "no band 6 .*its bands are 1 B01"),
        ((), "B04", r"no band 'B04'.* 1 \(no name\), 2 \(no name\)"),
        (("a", "a", "b", "", ""), "a", "several bands 'a'"),
    ],
)
def test_an_unknown_band_lists_those_of_the_file(names, bands, message):
    with pytest.raises(DataError, match=message):
        decode(geotiff(names=names), 1, options=ReadOptions(bands=bands))


def test_other_files_have_no_bands():
    with pytest.raises(DataError, match=r"not a TIFF, of which data.bands=4,3,2"):
        decode(saved(BANDS), 3, options=ReadOptions(bands="4,3,2"))


@pytest.mark.parametrize("text", ["", ",", "0,1", "()"])
def test_invalid_bands(text):
    with pytest.raises(UserError, match=r"data.bands=.* must be names or numbers from 1"):
        ReadOptions(bands=text)


@pytest.mark.parametrize(
    ("source", "bands", "message"),
    [
        ("folder", "B04,B03", "selects 2 bands, but model.channels is 3"),
        ("arrays", "3,2,1", "is for TIFFs"),
    ],
)
def test_bands_fit_the_model_and_the_source(source, bands, message):
    config = recipes.base()
    config.data.update(source=source, path="x", bands=bands)
    with pytest.raises(UserError, match=rf"data.bands='{bands}' {message}"):
        from_config_dict(config)


def test_commands_take_bands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.tif").write_bytes(geotiff())
    main(["check", str(tmp_path), "--bands", "B04,B03,B02"])
    assert "uint16: 1" in capsys.readouterr().out
    main(["stats", str(tmp_path), "--bands", "B04,B03,B02"])
    output = capsys.readouterr().out
    assert f"data.mean='({', '.join(f'{BANDS[..., i].mean():.6g}' for i in (3, 2, 1))},)'" in output
    assert "--config.data.bands=B04,B03,B02" in output
    with pytest.raises(DataError, match=r"selects 1 bands, but --channels is 3"):
        main(["check", str(tmp_path), "--bands", "B04"])
