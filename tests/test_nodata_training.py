"""Pixels without data in training: never mixed into others, and left out of the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_helpers import encoded, saved
from PIL import Image
from test_nodata import tiff, with_missing

from mae_jax.data.decode import decode
from mae_jax.data.in_memory import ArraySource, InMemory
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.sampling import color_entropy
from mae_jax.data.sources import DataError
from mae_jax.data.transforms import EvalTransform, TrainTransform, resize
from mae_jax.distributed import sharding
from mae_jax.evaluate.figures import to_rgb_uint8
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.yardsticks import yardstick_losses
from mae_jax.train import recipes
from mae_jax.train.build_model import make_task
from mae_jax.train.config import from_config_dict
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten

RNG = np.random.default_rng(0)
TINY = VitVariant(16, 1, 2, 4, decoder_width=16, decoder_depth=1, decoder_heads=2)
TASK = Pretrain(
    model=make_mae(TINY, grid=(4, 6), channels=2),
    grid=(4, 6),
    patch=4,
    mean=(5.0, -3.0),
    std=(2.0, 0.5),
    nodata=True,
)
KEY = jax.random.key(3)


sample = jax.jit(lambda task, batch: task.sample(KEY, batch), static_argnums=0)
loss_and_grads = jax.jit(
    lambda task, params, batch: jax.value_and_grad(lambda p: task.loss(p, {}, batch)[0])(params),
    static_argnums=0,
)


def images_with_gaps(rows=4):
    """Return images of which patches lack all values, all but one, a channel, or some at random."""
    images = RNG.normal(size=(rows, 16, 24, 2)).astype(np.float32)
    images = images * TASK.std + TASK.mean
    images[RNG.random(images.shape) < 0.1] = np.nan
    images[:, :8, :8] = np.nan
    images[:, 8:12, :, 1] = np.nan
    images[:, 12:, 20:] = np.nan
    images[:, 14, 22, 0] = 5.5
    return images.astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TASK.init)(jax.random.key(1))


@pytest.mark.parametrize(
    ("option", "value", "text", "dtype"),
    [
        ("-9999", -9999, None, "int16"),
        ("-9999.0", -9999, "7", "float32"),
        ("nan", np.nan, None, "float32"),
        ("file", -9999, "-9999", "float64"),
        ("file", -1.7976931348623157e308, "-1.7976931348623157e+308", "float64"),
        ("file", np.nan, None, "float32"),
        ("65535", 65535, None, "uint16"),
        ("2147483647", 2147483647, None, "int32"),
    ],
)
def test_samples_without_data_are_nan(option, value, text, dtype):
    image = with_missing(value, dtype)
    pixels = decode(tiff(image, text), 4, options=ReadOptions(option))
    expected = with_missing(np.nan)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("kind", ["PNG", "array", "TIFF"])
def test_uint8_becomes_fractions(kind):
    image = with_missing(0, "uint8", 3)
    file = {"PNG": encoded(Image.fromarray(image)), "array": image, "TIFF": tiff(image, "0")}[kind]
    pixels = decode(file, 3, options=ReadOptions("0"))
    np.testing.assert_array_equal(np.isnan(pixels), image == 0)
    np.testing.assert_allclose(pixels[image > 0], image[image > 0] / 255, rtol=1e-6)


def test_16_bits_of_a_picture_are_compared_before_they_are_scaled():
    image = np.full((8, 8), 1000, np.uint16)
    image[0], image[1] = 65535, 65534
    file = encoded(Image.fromarray(image))
    missing = np.isnan(decode(file, 1, options=ReadOptions("65535")))[..., 0]
    assert missing[0].all()
    assert not missing[1:].any()
    fractions = decode(file, 1, bit_depth=16, options=ReadOptions("65535"))
    np.testing.assert_allclose(fractions[2:], 1000 / 65535, rtol=1e-6)
    image[1] = 4095
    fractions = decode(saved(image), 1, bit_depth=12, options=ReadOptions("65535"))
    np.testing.assert_array_equal(np.isnan(fractions[..., 0]), image == 65535)
    np.testing.assert_array_equal(fractions[1], 1)


def test_without_the_option_nan_is_an_error_and_nothing_is_replaced():
    with pytest.raises(DataError, match=r"NaN or Inf, 12.5 % .* data.nodata=nan"):
        decode(tiff(with_missing(np.nan), None), 4)
    assert decode(tiff(with_missing(-9999), "-9999"), 4).min() == -9999


def test_an_invalid_option_names_the_key():
    with pytest.raises(UserError, match=r"data.nodata='none' must be a number"):
        ReadOptions("none")


def test_images_in_memory_are_not_masked_twice():
    """1.0 is the fraction of 255, not the NoData 1."""
    image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    options = ReadOptions("1")
    source = InMemory(ArraySource("a", [image]), 3, options=options)
    again = decode(source[0]["image"], 3, options=options.of_decoded)
    np.testing.assert_array_equal(again, decode(image, 3, options=options))
    np.testing.assert_array_equal(np.isnan(again), image == 1)


@pytest.mark.parametrize("size", [(9, 7), (32, 40), (20, 20)])
def test_resizing_never_mixes_in_missing_values(size):
    """Whatever the missing values were, the result is the same, between those of the others."""
    image = RNG.uniform(10, 11, (20, 20, 2)).astype(np.float32)
    missing = RNG.random(image.shape) < 0.3
    missing[:9, :9] = True
    image[missing] = np.nan
    resized = resize(image, size)
    assert np.isnan(resized[0, 0]).all()
    assert 0.1 < np.isnan(resized).mean() < 0.5
    assert 9 < np.nanmin(resized) < np.nanmax(resized) < 12
    complete = np.full_like(image, 10.0)
    complete[missing] = np.nan
    np.testing.assert_allclose(resize(complete, size)[~np.isnan(resized)], 10, rtol=1e-5)


def test_far_from_missing_values_resizing_is_unchanged():
    image = RNG.uniform(10, 11, (40, 40, 1)).astype(np.float32)
    expected = resize(image, (20, 20))
    image[:10] = np.nan
    np.testing.assert_allclose(resize(image, (20, 20))[8:], expected[8:], rtol=1e-5)


@pytest.mark.parametrize("make", [TrainTransform, EvalTransform])
def test_transforms_keep_the_units(make):
    arguments = dict(scale=(0.2, 1.0)) if make is TrainTransform else {}
    image = np.full((40, 30, 4), 7.0)
    image[10:20] = -9999
    transform = make((16, 24), 4, **arguments, options=ReadOptions("-9999"))
    pixels = transform(saved(image), np.random.default_rng(0))["image"]
    assert np.isnan(pixels).any()
    np.testing.assert_allclose(pixels[~np.isnan(pixels)], 7, rtol=1e-5)


def loss_over_valid_values(task, params, batch):
    """Compute the loss in float64 with loops over patches, from the decoder's predictions."""
    ids = np.asarray(batch.get("ids_predicted", batch["ids_masked"]))
    filled = np.where(np.isnan(batch["image"]), np.float32(task.mean), batch["image"])
    patches = dataclasses.replace(task, nodata=False).to_patches(jnp.asarray(filled))
    pred = jax.jit(lambda *args: task.apply("__call__", *args))(
        params, patches, batch["ids_keep"], ids
    )
    errors = []
    for image, rows, numbers in zip(np.asarray(batch["image"]), np.asarray(pred), ids):
        for row, number in zip(rows, numbers):
            y, x = divmod(int(number), 6)
            target = image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            target = ((np.float64(target) - task.mean) / task.std).ravel()
            valid = ~np.isnan(target)
            values = target[valid]
            if task.norm_pix and values.size:
                variance = values.var(ddof=1) if values.size > 1 else 0
                values = (values - values.mean()) / np.sqrt(variance + task.norm_pix_eps)
            errors += list(np.square(row[valid] - values))
    return np.mean(errors)


@pytest.mark.parametrize(("norm_pix", "ratio"), [(True, 1.0), (False, 0.5)])
def test_loss_is_the_mean_over_valid_values_of_the_global_batch(params, norm_pix, ratio):
    task = dataclasses.replace(TASK, norm_pix=norm_pix, predict_ratio=ratio)
    batch = sample(task, {"image": images_with_gaps()})
    expected = loss_over_valid_values(task, params, batch)
    loss, grads = loss_and_grads(task, params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(np.isfinite(grad).all() for grad in flatten(grads).values())
    if ratio < 1:
        # Micro-batches of unequal numbers of valid values: their mean is the same.
        halves = [{name: x[i::2] for name, x in batch.items()} for i in range(2)]
        losses = [loss_and_grads(task, params, half)[0] for half in halves]
        np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-5)


def test_masks_stay_and_patches_without_data_are_predicted_last():
    images = images_with_gaps(8)
    images[:, :, 4:20] = np.nan  # 8 of 24 patches have data
    task = dataclasses.replace(TASK, predict_ratio=0.25)
    sampled = task.sample(KEY, {"image": jnp.asarray(images)})
    plain = dataclasses.replace(task, nodata=False).sample(KEY, {"image": jnp.asarray(images)})
    np.testing.assert_array_equal(sampled["ids_keep"], plain["ids_keep"])
    has_data = np.asarray(task.valid_values(jnp.asarray(images)).any(axis=-1))
    masked, predicted = (
        np.take_along_axis(has_data, np.asarray(sampled[name]), axis=1).sum(axis=1)
        for name in ("ids_masked", "ids_predicted")
    )
    np.testing.assert_array_equal(predicted, np.minimum(masked, task.num_predicted))
    complete = task.sample(KEY, {"image": jnp.zeros((8, 16, 24, 2))})
    np.testing.assert_array_equal(complete["ids_predicted"], plain["ids_predicted"])


def test_a_batch_without_data_has_loss_and_gradients_of_0(params):
    batch = sample(TASK, {"image": np.full((4, 16, 24, 2), np.nan, np.float32)})
    loss, grads = loss_and_grads(TASK, params, batch)
    assert loss == 0
    assert all((np.asarray(grad) == 0).all() for grad in flatten(grads).values())


def test_complete_images_have_the_usual_loss(params):
    batch = {"image": RNG.normal(size=(4, 16, 24, 2)).astype(np.float32)}
    usual = dataclasses.replace(TASK, nodata=False)
    expected, _ = jax.jit(usual.loss)(params, {}, sample(usual, batch))
    loss, _ = loss_and_grads(TASK, params, sample(TASK, batch))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_features_and_reconstructions_are_finite(params):
    images = jnp.asarray(images_with_gaps())
    assert np.isfinite(jax.jit(TASK.features)(params, images)).all()
    mask = TASK.sample_mask(KEY, len(images))
    reconstruct = jax.jit(TASK.reconstruct, static_argnames="stats")
    pictures = reconstruct(params, images, mask, stats="visible")
    assert np.isfinite(pictures).all()


def test_yardsticks_are_over_valid_values():
    images, mask = images_with_gaps(), TASK.sample_mask(KEY, 4)
    for norm_pix in (False, True):
        task = dataclasses.replace(TASK, norm_pix=norm_pix)
        losses = yardstick_losses(task, [images], mask)
        assert np.isfinite(list(losses.values())).all()
        errors = []
        for image, ids in zip(images, np.asarray(mask.ids_masked)):
            for y, x in (divmod(int(i), 6) for i in ids):
                patch = image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
                values = ((np.float64(patch) - task.mean) / task.std).ravel()
                values = values[~np.isnan(values)]
                if values.size:
                    variance = values.var(ddof=1) if norm_pix and values.size > 1 else 0
                    scale = variance + task.norm_pix_eps if norm_pix else 1
                    errors += list(np.square(values - values.mean()) / scale)
        np.testing.assert_allclose(losses["patch_mean"], np.mean(errors), rtol=1e-4)


def test_pixels_without_data_are_drawn_black_and_have_no_entropy():
    image = np.full((1, 4, 4, 3), 0.5, np.float32)
    image[0, 0] = np.nan
    drawn = to_rgb_uint8(image, (0, 1, 2), (0.5,) * 3, (0.1,) * 3)
    assert (drawn[0, 0] == 0).all()
    assert (drawn[0, 1:] == 128).all()
    assert color_entropy(image[0]) == 0


@pytest.mark.parametrize("task", ["pretrain", "classify", "segment"])
def test_every_task_fills_what_the_config_names(task):
    config = recipes.base()
    config.task, config.data.nodata = task, "-9999"
    config.model.update(image_size=(16, 16), patch=8, width=16, depth=1, heads=2)
    built = make_task(from_config_dict(config), sharding.make_mesh(), ("a", "b"))
    images = jnp.full((1, 16, 16, 3), jnp.nan).at[0, 0].set(1.0)
    filled = built.to_patches(images) if task == "pretrain" else built.normalize(images)
    assert np.isfinite(filled).all()
    assert (np.asarray(filled) == 0).mean() == 15 / 16
