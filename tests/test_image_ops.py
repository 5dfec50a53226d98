"""Resizing on the device against Pillow; normalization and its inverse for all dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_helpers import photograph
from PIL import Image

from mae_jax.data.transforms import random_crop_box
from mae_jax.models.image_ops import crop_resize, denormalize, normalize, resize_center_crop

CANVAS, SIZE = 512, (224, 224)


def pillow(crop, size):
    picture = Image.fromarray(crop).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def psnr(one, other):
    """Return the PSNR of every image, dB; at most 78."""
    error = np.square(one.astype(float) - other).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


@pytest.fixture(scope="module")
def crops():
    """Return crops of a photograph as in training: canvases, sizes, flips, and the crops."""
    image, rng = np.asarray(photograph()), np.random.default_rng(0)
    canvases = np.full(
        (100, CANVAS, CANVAS, 3), 77, np.uint8
    )  # pixels outside the crop do not matter
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
    with jax.default_matmul_precision("bfloat16"):  # crop_resize does not use it
        return np.asarray(jax.jit(crop_resize, static_argnums=3)(canvases, sizes, flips, SIZE))


def test_crop_resize_is_close_to_pillow(crops, resized):
    expected = [pillow(c, SIZE)[:, :: -1 if f else 1] for c, f in zip(crops[3], crops[2])]
    actual = psnr(resized, np.stack(expected))
    assert actual.mean() > 70, "dB"
    assert actual.min() > 50, "dB"


def test_crop_resize_equals_pillow_in_the_same_order_of_axes(crops, resized):
    """Except for one value in ten thousand, which is rounded the other way at a half."""
    by_axis = np.stack(
        [
            pillow(pillow(crop, (len(crop), SIZE[1])), SIZE)[:, :: -1 if flip else 1]
            for crop, flip in zip(crops[3], crops[2])
        ]
    )
    differs = resized != by_axis
    assert differs.mean() < 2e-4
    assert np.abs(resized.astype(int) - by_axis).max() <= 1


def test_integers_do_not_overflow_in_images_of_extreme_shapes():
    column = np.linspace(0, 1, 20_000)[:, None] ** 2 * 255
    images = jnp.asarray(np.broadcast_to(column, (20_000, 20)).astype(np.uint8)[None, :, :, None])
    resized = jax.jit(resize_center_crop, static_argnums=(1, 2))(images, (256_000, 256), (8, 8))
    np.testing.assert_array_equal(resized, 63)


def test_resizing_to_the_same_size_is_the_identity():
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 1), dtype=np.uint8)
    canvas = np.zeros((1, CANVAS, CANVAS, 1), np.uint8)
    canvas[:, : SIZE[0], : SIZE[1]] = image
    for flip in (False, True):
        arrays = map(jnp.asarray, (canvas, np.array([SIZE], np.int32), np.array([flip])))
        actual = crop_resize(*arrays, SIZE)
        np.testing.assert_array_equal(actual, image[:, :, :: -1 if flip else 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_denormalize_inverts_normalize(dtype):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 5)).astype(dtype)
    scale = 255 if dtype == np.uint8 else 1
    mean, std = [100 / scale] * 5, [30 / scale] * 5
    pixels = normalize(jnp.asarray(images), mean, std)
    np.testing.assert_allclose(pixels, (images - 100.0) / 30, rtol=1e-4, atol=1e-5)
    back = denormalize(pixels, mean, std, images.dtype)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, images, atol=1e-3)


def test_denormalize_clips_to_the_range_of_the_dtype():
    pixels = jnp.array([-9.0, 9.0]).reshape(1, 1, 2, 1)
    for dtype, high in ((jnp.uint8, 255), (jnp.uint16, 65535)):
        actual = denormalize(pixels, [0.5], [20_000.0], dtype)
        assert actual.ravel().tolist() == [0, high]
