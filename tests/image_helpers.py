"""Small images for tests, as arrays and as files."""

import io

import numpy as np
from PIL import Image


def noise_image(seed, size=(20, 16)):
    """Return an RGB image of random values; size is height, width."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def photograph():
    """Return a real photograph of 300 x 451 pixels."""
    from skimage import data

    return Image.fromarray(data.chelsea())


def encoded(image, kind="PNG", **options):
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def saved(array, suffix=".npy"):
    """Return the bytes of a numpy file."""
    buffer = io.BytesIO()
    np.save(buffer, array) if suffix == ".npy" else np.savez(buffer, image=array)
    return buffer.getvalue()


def fill_folder(path):
    """Write two classes of ten images, a text file and a hidden file; return the folder."""
    for label, name in enumerate(["zebra", "ant"]):
        (path / name).mkdir()
        for i in range(10):
            noise_image(100 * label + i).save(path / name / f"{i}.png")
    (path / "ant" / "notes.txt").write_text("no image")
    (path / "ant" / ".hidden.png").write_bytes(b"")
    return path
