"""PNGs: without the text that Pillow would decompress, and with all 16 bits of their values.

Source: https://www.w3.org/TR/png-3/
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from mae_jax.data.file_kinds import PNG

# Never needed for the pixels. Pillow decompresses them, and rejects images with more than 1 MiB.
UNUSED_CHUNKS = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")


def without_text(encoded: bytes) -> bytes:
    """Return a PNG without its color profile and text; other files as they are."""
    if not encoded.startswith(PNG):
        return encoded
    kept, start = [], 0
    for kind, begin, end in _chunks(encoded):
        if kind in UNUSED_CHUNKS:
            kept.append(encoded[start:begin])
            start = end
    return b"".join([*kept, encoded[start:]]) if kept else encoded


def _chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, begin and end of every chunk, with its length, type and checksum."""
    begin = len(PNG)
    while begin + 12 <= len(encoded):
        kind = encoded[begin + 4 : begin + 8]
        end = begin + 12 + int.from_bytes(encoded[begin : begin + 4], "big")
        yield kind, begin, end
        if kind == b"IEND":
            return
        begin = end


def has_16_bits(encoded: bytes) -> bool:
    """Return whether a file is a PNG with 16 bits per value."""
    return encoded.startswith(PNG) and encoded[24:25] == b"\x10"


def read_16_bits(encoded: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the samples of a PNG of 16 bits per value, uint16 [h, w, c]; alpha is the last.

    Pillow keeps only the upper byte of RGB, so the bytes of a value are decoded as two values.

    Args:
      size: width and height.
    """
    data = b"".join(
        encoded[begin + 8 : end - 4] for kind, begin, end in _chunks(encoded) if kind == b"IDAT"
    )
    color_type, interlaced = encoded[25], encoded[28]

    def unpack(mode: str, raw_mode: str) -> np.ndarray:
        return np.asarray(Image.frombytes(mode, size, data, "zip", raw_mode, interlaced))

    if color_type in (0, 4):  # gray, gray and alpha
        mode = "LA" if color_type == 0 else "RGBA"
        return unpack(mode, mode).view(">u2").astype(np.uint16)
    mode = "RGB" if color_type == 2 else "RGBA"
    upper, lower = (unpack(mode, f"{mode};16{order}") for order in "BL")
    return upper.astype(np.uint16) << 8 | lower
