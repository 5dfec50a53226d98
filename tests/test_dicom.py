"""DICOM files, written by pydicom: units, windows, padding, colors, and what is refused."""

import io
import sys

import numpy as np
import pytest
from image_helpers import encoded as encoded_image
from PIL import Image
from pydicom import DataElement, dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from mae_jax.data.__main__ import main
from mae_jax.data.decode import decode
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.utils.errors import UserError

STORED = np.arange(12 * 10, dtype=np.int16).reshape(12, 10) * 20
HOUNSFIELD = STORED.astype(np.float32) - 1024


def dicom(pixels=STORED, syntax=ExplicitVRLittleEndian, frames=None, bits=None, **elements):
    """Return the bytes of a DICOM file; pixels may be those of an encapsulated frame."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(
        entropy_srcs=["test"]
    )
    array = pixels if isinstance(pixels, np.ndarray) else STORED
    dataset.Rows, dataset.Columns = array.shape[:2]
    dataset.SamplesPerPixel = 1 if array.ndim == 2 else array.shape[2]
    dataset.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * array.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    if frames:
        dataset.NumberOfFrames = frames
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = array.tobytes() * (frames or 1) if array is pixels else pixels
    if syntax.is_compressed:
        dataset["PixelData"].is_undefined_length = True
    if syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def ct(pixels=STORED, **elements):
    return dicom(pixels, RescaleSlope=1, RescaleIntercept=-1024, **elements)


def windowed(center, width):
    """Return Hounsfield units in a linear window (PS3.3 C.11.2.1.2.1) in 8 bits."""
    values = (HOUNSFIELD - (center - 0.5)) / (width - 1) + 0.5
    return (255 * values.clip(0, 1)).round()


def test_modality_lut_gives_hounsfield_units():
    image = decode(ct(), 1)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image[..., 0], HOUNSFIELD)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_stored_values_without_modality_lut(syntax):
    pixels = STORED.astype(np.uint16)
    image = decode(dicom(pixels, syntax), 1)
    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image[..., 0], pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("option", "elements", "expected"),
    [
        ("40,400", dict(WindowCenter=7, WindowWidth=9), windowed(40, 400)),
        ("(-500, 1500)", {}, windowed(-500, 1500)),
        ("file", dict(WindowCenter=40, WindowWidth=400), windowed(40, 400)),
        ("file", dict(WindowCenter=[50, 1], WindowWidth=[350, 2]), windowed(50, 350)),
    ],
)
def test_a_window_makes_8_bits(channels, option, elements, expected):
    image = decode(ct(**elements), channels, options=ReadOptions(dicom_window=option))
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image, np.repeat(expected[..., None], channels, axis=-1), atol=1)
    np.testing.assert_array_equal(image[..., 0], image[..., -1])


def test_a_sigmoid_and_a_voi_lut_of_the_file():
    sigmoid = dict(WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID")
    image = decode(ct(**sigmoid), 1, options=ReadOptions(dicom_window="file"))[..., 0]
    expected = 255 / (1 + np.exp(-4 * (HOUNSFIELD - 40) / 400))
    np.testing.assert_allclose(image, expected, atol=1)
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.add_new("LUTData", "US", [0, 10, 200, 255])
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    file = dicom(pixels, VOILUTSequence=[table])
    image = decode(file, 1, options=ReadOptions(dicom_window="file"))[..., 0]
    np.testing.assert_array_equal(image.ravel(), [0, 10, 200, *[255] * 9])


def test_monochrome1_is_inverted():
    inverted = dict(PhotometricInterpretation="MONOCHROME1")
    pixels = STORED.astype(np.uint16)
    image = decode(dicom(pixels, bits=12, **inverted), 1)
    np.testing.assert_array_equal(image[..., 0], 4095 - pixels)
    options = ReadOptions(dicom_window="40,400")
    np.testing.assert_array_equal(
        decode(ct(**inverted), 1, options=options), 255 - decode(ct(), 1, options=options)
    )


@pytest.mark.parametrize("window", [None, "40,400"])
def test_padding_has_no_data(window):
    pixels = STORED.copy()
    pixels[0], pixels[1], pixels[2] = -2000, -1990, -1980
    file = ct(pixels, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990)
    image = decode(file, 1, options=ReadOptions(nodata="file", dicom_window=window))[..., 0]
    assert np.isnan(image[:2]).all()
    assert np.isfinite(image[2:]).all()
    # A number is in the units of the image.
    image = decode(file, 1, options=ReadOptions(nodata="-3024", dicom_window=window))[..., 0]
    assert np.isnan(image[0]).all()
    assert np.isfinite(image[1:]).all()


@pytest.mark.parametrize(
    ("kind", "value", "header", "bits"),
    [("i2", -2000, 63536, 16), ("i2", -32768, -32768, 12), ("u2", 63536, 63536, 12)],
    ids=["unsigned in the header", "beyond BitsStored", "unsigned beyond BitsStored"],
)
def test_padding_of_another_range_than_the_values(kind, value, header, bits):
    expected = (STORED // 2).astype(np.float32)
    pixels = expected.astype(kind)
    pixels[1], expected[1] = value, np.nan
    file = dicom(pixels, bits=bits, PixelPaddingValue=value)
    if header != value:
        dataset = dcmread(io.BytesIO(file))
        dataset["PixelPaddingValue"] = DataElement(0x00280120, "US", header)
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        file = buffer.getvalue()
    image = decode(file, 1, options=ReadOptions(nodata="file"))
    np.testing.assert_array_equal(image[..., 0], expected)


def test_colors():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(dicom(pixels), 3), pixels)
    gray = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(decode(dicom(pixels), 1)[..., 0], gray)
    smooth = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    jpeg = encapsulate([encoded_image(Image.fromarray(smooth), "JPEG", quality=95, subsampling=0)])
    elements = dict(PhotometricInterpretation="YBR_FULL", SamplesPerPixel=3, Rows=16, Columns=16)
    elements |= dict(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)
    file = dicom(jpeg, JPEGBaseline8Bit, PlanarConfiguration=0, **elements)
    np.testing.assert_allclose(decode(file, 3), smooth, atol=3)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        (dicom(frames=3), {}, "it is a DICOM file of 3 frames: save each one as a file"),
        (
            ct(),
            dict(dicom_window="file"),
            "without a window: set data.dicom_window to CENTER,WIDTH",
        ),
        (
            dicom(encapsulate([b"\xff\xd8"]), JPEGLosslessSV1),
            {},
            r"compressed with JPEG Lossless.* pip install 'pylibjpeg\[all\]'",
        ),
        (ct()[:-100], {}, "pixel data"),
        (dicom(RescaleSlope=0, RescaleIntercept=1), {}, "slope is 0, and its intercept 1"),
        (dicom(RescaleSlope=None, RescaleIntercept=1), {}, "slope is missing, and its intercept 1"),
        (
            dicom(encapsulate([b"\xff\xd8"]), JPEGBaseline8Bit, BitsAllocated=8, BitsStored=8),
            {},
            r"compressed with JPEG Baseline.*, which is corrupt or needs other packages \(pip",
        ),
        (ct(), dict(bands="1"), "not a TIFF"),
    ],
    ids=["frames", "window", "codec", "truncated", "no slope", "empty slope", "damaged", "bands"],
)
def test_what_cannot_be_read_is_named(file, options, message):
    with pytest.raises(DataError, match=message):
        decode(file, 1, options=ReadOptions(**options))


@pytest.mark.parametrize("text", ["40", "40,0", "a,b", "nan,400", ""])
def test_an_invalid_window(text):
    with pytest.raises(UserError, match=r"data.dicom_window='.*' must be 'file', or CENTER,WIDTH"):
        ReadOptions(dicom_window=text)


def test_gray_units_are_for_one_channel():
    with pytest.raises(DataError, match=r"gray DICOM image of float64 .*model.channels=1, or set"):
        decode(ct(), 3)
    pixels = STORED.astype(np.uint8)
    np.testing.assert_array_equal(decode(dicom(pixels), 3), pixels[..., None].repeat(3, axis=-1))


def test_a_preamble_may_be_that_of_a_tiff():
    """As of scanners whose files are read by software for TIFF, too."""
    file = b"II*\0" + ct()[4:]
    np.testing.assert_array_equal(decode(file, 1)[..., 0], HOUNSFIELD)


def test_without_pydicom_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mae_jax.data.dicom", raising=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DataError, match=r"needs pydicom: pip install 'mae_jax\[dicom\]'"):
        decode(ct(), 1)


def test_folders_and_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.dcm").write_bytes(ct())
    assert len(FolderSource(str(tmp_path), "")) == 1
    arguments = [str(tmp_path), "--channels", "1"]
    main(["stats", *arguments, "--dicom-window", "40,400"])
    output = capsys.readouterr().out
    image = decode(ct(), 1, options=ReadOptions(dicom_window="40,400"))
    assert f"data.mean='({image.mean() / 255:.6g},)'" in output
    assert "--config.data.dicom_window=40,400" in output
    main(["check", *arguments])
    assert "float32: 1" in capsys.readouterr().out
