"""Kinds of files by their first bytes: those that are read here, and names of others."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NUMPY = (b"\x93NUMPY", b"PK\x03\x04")  # .npy, .npz
UPRIGHT = (*TIFF, *NUMPY)  # always decoded upright: EXIF has no say
DICOM_OFFSET, DICOM = 128, b"DICM"

# Offset, bytes there, and the kind.
PICTURES = (
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypheix", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypmsf1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftypcrx ", "a raw photograph (CR3)"),
    (0, b"FUJIFILMCCD-RAW", "a raw photograph (RAF)"),
    (0, b"IIRO", "a raw photograph (ORF)"),
    (0, b"IIU\0", "a raw photograph (RW2)"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"II\xbc", "a JPEG XR picture"),
    (0, b"v/1\x01", "an OpenEXR picture"),
    (0, b"#?RADIANCE", "a Radiance HDR picture"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 or NetCDF file"),
    (0, b"CDF\x01", "a NetCDF file"),
    (0, b"CDF\x02", "a NetCDF file"),
    (0, b"GRIB", "a GRIB file"),
    (0, b"BUFR", "a BUFR file"),
    (344, b"n+1\0", "a NIfTI file"),
    (0, b"%PDF-", "a PDF document"),
)
OTHERS = (
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it"),
    (0, b"BZh", "a bzip2 archive: unpack it"),
    (0, b"\xfd7zXZ\0", "an xz archive: unpack it"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer to a file: git lfs pull gets the file"),
)
DAMAGED = (
    (0, PNG, "PNG"),
    (0, b"BM", "BMP"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
)


def why_not_an_image(encoded: bytes) -> str:
    """Return what a file is that Pillow cannot identify, and what to do."""
    if not encoded:
        return "it is empty"
    if kind := _find(encoded, PICTURES):
        return f"it is {kind}, which is not supported: convert it to PNG, TIFF or .npy"
    if kind := _find(encoded, OTHERS):
        return f"it is {kind}"
    if kind := _find(encoded, DAMAGED):
        return f"it is a {kind} whose header is damaged, or of a kind that Pillow does not read"
    if encoded.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        is_drawing = b"<svg" in encoded[:1000].lower()
        drawing = "a drawing (SVG): convert it to PNG"
        return (
            f"it is {drawing}" if is_drawing else "it is a web page or other markup, not an image"
        )
    return "its bytes are not an image"


def _find(encoded: bytes, table: tuple[tuple[int, bytes, str], ...]) -> str | None:
    matches = (kind for offset, magic, kind in table if encoded.startswith(magic, offset))
    return next(matches, None)
