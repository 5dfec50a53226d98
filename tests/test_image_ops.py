"""Resizing on the device against Pillow, and values of any type there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_helpers import photograph
from PIL import Image

from mae_jax.data.transforms import random_crop_box
from mae_jax.models.image_ops import crop_resize, denormalize, normalize

CANVAS, SIZE = 512, (224, 224)


def pillow(crop, size):
    picture = Image.fromarray(crop).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def psnr(one, other):
    """In dB, of each image; 0 errors count as 78."""
    error = np.square(one.astype(float) - other).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


@pytest.fixture(scope="module")
def crops():
    """The recipe's crops of a photograph: canvases, sizes, flips, and the crops themselves."""
    image, rng = np.asarray(photograph()), np.random.default_rng(0)
    canvases = np.full((100, CANVAS, CANVAS, 3), 77, np.uint8)  # what is outside does not count
    cut = []
    for canvas in canvases:
        left, top, right, lower = random_crop_box(rng, image.shape[:2], (0.2, 1.0))
        cut.append(np.ascontiguousarray(image[top:lower, left:right]))
        canvas[: lower - top, : right - left] = cut[-1]
    sizes = np.array([crop.shape[:2] for crop in cut], np.int32)
    return canvases, sizes, rng.random(len(cut)) < 0.5, cut


@pytest.fixture(scope="module")
def resized(crops):
    canvases, sizes, flips, _ = crops
    with jax.default_matmul_precision("bfloat16"):  # which crop_resize does not follow
        return np.asarray(jax.jit(crop_resize, static_argnums=3)(canvases, sizes, flips, SIZE))


def test_it_is_pillow(crops, resized):
    whole = np.stack([pillow(c, SIZE)[:, :: -1 if f else 1] for c, f in zip(crops[3], crops[2])])
    found = psnr(resized, whole)
    assert found.mean() > 70, "dB"
    assert found.min() > 50, "dB"


def test_rows_before_columns_it_is_pillow_to_the_bit(crops, resized):
    """Nearly: one value in ten thousand lies on a half, and is rounded the other way."""
    by_axis = np.stack(
        [
            pillow(pillow(crop, (len(crop), SIZE[1])), SIZE)[:, :: -1 if flip else 1]
            for crop, flip in zip(crops[3], crops[2])
        ]
    )
    differs = resized != by_axis
    assert differs.mean() < 2e-4
    assert np.abs(resized.astype(int) - by_axis).max() <= 1


def test_a_crop_of_the_wanted_size_stays_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 1), dtype=np.uint8)
    canvas = np.zeros((1, CANVAS, CANVAS, 1), np.uint8)
    canvas[:, : SIZE[0], : SIZE[1]] = image
    for flip in (False, True):
        found = crop_resize(canvas, np.array([SIZE], np.int32), np.array([flip]), SIZE)
        np.testing.assert_array_equal(found, image[:, :, :: -1 if flip else 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_values_there_and_back(dtype):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 5)).astype(dtype)
    scale = 255 if dtype == np.uint8 else 1
    mean, std = [100 / scale] * 5, [30 / scale] * 5
    pixels = normalize(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(pixels, (images - 100.0) / 30, rtol=1e-4, atol=1e-5)
    back = denormalize(pixels, mean, std, images.dtype)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, images, atol=1e-3)


def test_values_beyond_the_type_are_clipped():
    pixels = jnp.array([-9.0, 9.0]).reshape(1, 1, 2, 1)
    for dtype, high in ((jnp.uint8, 255), (jnp.uint16, 65535)):
        found = denormalize(pixels, [0.5], [20_000.0], dtype)
        assert found.ravel().tolist() == [0, high]
