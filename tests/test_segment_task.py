"""Segmentation: loss, heads, and the transforms of images with masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mae_jax.data.in_memory import ArraySource
from mae_jax.data.loader import Loader
from mae_jax.data.mask_transforms import ScaleCropTransform, WholeTransform
from mae_jax.data.segmentation import SegmentationSource
from mae_jax.data.sources import DataError
from mae_jax.evaluate.mask_files import pixel_classes
from mae_jax.models.classifier import Classifier
from mae_jax.models.segmentation import bilinear_weights, upsample
from mae_jax.models.vit import Encoder
from mae_jax.tasks.segment import Segment

IGNORE = 255
ENCODER = Encoder(width=16, depth=1, num_heads=2, grid=(2, 3), drop_path=0.1)


def task_of(**changes):
    model = Classifier(ENCODER, num_classes=4, pool="grid", head_init_std=1.0, **changes)
    return Segment(model=model, patch=8, mean=(0.5,) * 3, std=(0.2,) * 3, ignore=IGNORE)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    masks = rng.integers(0, 4, (4, 16, 24)).astype(np.uint8)
    masks[rng.random(masks.shape) < np.array([0.1, 0.5, 0.9, 1.0])[:, None, None]] = IGNORE
    return {"image": jnp.asarray(images), "mask": jnp.asarray(masks)}


@pytest.fixture(scope="module")
def linear():
    task = task_of()
    return task, jax.jit(task.init)(jax.random.key(0))


def test_loss_is_the_cross_entropy_of_labeled_pixels(linear, batch):
    task, params = linear
    task = dataclasses.replace(
        task, model=task.model.clone(encoder=ENCODER.clone(drop_path=0.0), parent=None)
    )
    logits = np.asarray(jax.jit(task.outputs)(params, {}, batch["image"]).logits, np.float64)
    assert logits.shape == (4, 2, 3, 4)
    rows, columns = bilinear_weights(16, 2), bilinear_weights(24, 3)
    logits = np.einsum("hy,byxc,wx->bhwc", rows, logits, columns)
    masks = np.asarray(batch["mask"])
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    losses = [-log_probabilities[*at, masks[*at]] for at in np.argwhere(masks != IGNORE)]
    sampled = task.sample(jax.random.key(0), batch)
    loss, stats = jax.jit(task.loss)(params, {}, sampled)
    assert stats == {}
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    nothing = batch | {"mask": jnp.full_like(batch["mask"], IGNORE)}
    assert task.loss(params, {}, task.sample(jax.random.key(0), nothing))[0] == 0


def test_micro_batches_weigh_every_labeled_pixel_the_same(linear, batch):
    """Though one of the images has no labeled pixel, and others few."""
    task, params = linear
    sampled = task.sample(jax.random.key(1), batch)
    assert sampled["drop_path_noise"].shape == (4, 1, 2)
    loss = jax.jit(task.loss)
    whole, *halves = (
        loss(params, {}, {name: x[rows] for name, x in sampled.items()})[0]
        for rows in (slice(None), slice(0, None, 2), slice(1, None, 2))
    )
    assert abs(halves[0] - halves[1]) > 0.1
    np.testing.assert_allclose(np.mean(halves), whole, rtol=1e-5)


def test_predictions_are_those_of_interpolated_logits(linear, batch):
    """On the devices, and on the host for images of any size."""
    task, params = linear
    predicted = np.asarray(jax.jit(task.predict)(params, {}, batch["image"]))
    logits = jax.jit(task.outputs)(params, {}, batch["image"]).logits
    np.testing.assert_array_equal(predicted, upsample(logits, (16, 24)).argmax(axis=-1))
    np.testing.assert_array_equal(pixel_classes(np.asarray(logits[0]), (16, 24)), predicted[0])
    other = np.asarray(upsample(logits[:1], (37, 11)))[0].argmax(axis=-1)
    np.testing.assert_array_equal(pixel_classes(np.asarray(logits[0]), (37, 11)), other)
    params = jax.tree.map(lambda x: x * np.nan, params)
    assert (np.asarray(task.predict(params, {}, batch["image"])) == 4).all()


def test_the_upsampling_head(batch):
    task = task_of(upsample_width=8)
    params = jax.jit(task.init)(jax.random.key(0))
    assert params["upsample"]["conv0"]["kernel"].shape == (3, 3, 16, 8)
    assert params["upsample"]["conv3"]["kernel"].shape == (3, 3, 8, 8)
    assert params["head"]["kernel"].shape == (8, 4)
    logits = jax.jit(task.outputs)(params, {}, batch["image"]).logits
    assert logits.shape == (4, 16, 24, 4), "eight times the grid of 2 x 3"
    features = jax.jit(task.features)(params, batch["image"])
    assert features.shape == (4, 16)


def picture(rows=60, columns=100, cell=20):
    """Return an image of flat cells, and its mask: red is the class times 40."""
    classes = np.random.default_rng(1).integers(0, 6, (rows // cell, columns // cell))
    mask = np.kron(classes, np.ones((cell, cell), int)).astype(np.uint8)
    return np.stack([40 * mask, 255 - 40 * mask, np.full_like(mask, 7)], axis=-1), mask


COMMON = dict(image_size=(32, 48), channels=3, num_classes=6, ignore=IGNORE)
SCALE_CROP = ScaleCropTransform(scale=(0.5, 2.0), fill=(1, 2, 3), **COMMON)


def test_scale_crop_and_flip_keep_image_and_mask_aligned():
    image, mask = picture()
    ignored, agreeing = [], []
    for seed in range(40):
        made = SCALE_CROP(image, np.random.default_rng(seed), mask)
        assert made["image"].shape == (32, 48, 3)
        assert (made["mask"].shape, made["mask"].dtype) == ((32, 48), np.uint8)
        outside = made["mask"] == IGNORE
        assert (made["image"][outside] == (1, 2, 3)).all()
        ignored.append(outside.mean())
        error = np.abs(made["image"][..., 0].astype(int) - 40 * made["mask"].astype(int))
        agreeing.append((error[~outside] <= 8).mean())
    assert min(ignored) == 0
    assert 0.5 < max(ignored) < 0.8, "an image of half the size covers at least a quarter"
    assert min(agreeing) > 0.75, "only pixels at borders differ"


def test_a_mirrored_image_has_a_mirrored_mask():
    image, mask = picture()
    plain = dataclasses.replace(SCALE_CROP, flip=False)
    flipped = 0
    for seed in range(8):
        ours, theirs = (t(image, np.random.default_rng(seed), mask) for t in (plain, SCALE_CROP))
        if np.array_equal(ours["mask"], theirs["mask"]):
            np.testing.assert_array_equal(ours["image"], theirs["image"])
        else:
            flipped += 1
            for name in ("image", "mask"):
                np.testing.assert_array_equal(ours[name], theirs[name][:, ::-1])
    assert 0 < flipped < 8


def test_evaluation_sees_the_whole_image():
    image, mask = picture()
    made = WholeTransform(**COMMON)(image, None, mask)
    assert made["image"].shape == (32, 48, 3)
    columns = ((np.arange(48) + 0.5) * 100 / 48).astype(int)
    rows = ((np.arange(32) + 0.5) * 60 / 32).astype(int)
    np.testing.assert_array_equal(made["mask"], mask[rows][:, columns])


def test_masks_that_do_not_fit_are_refused():
    image, mask = picture()
    with pytest.raises(DataError, match="its mask has 60 x 90 pixels, the image 60 x 100"):
        SCALE_CROP(image, np.random.default_rng(0), mask[:, :90])
    few = dataclasses.replace(SCALE_CROP, num_classes=3)
    with pytest.raises(DataError, match="has the class [345], but classes are 0 to 2, and 255"):
        few(image, np.random.default_rng(0), mask)


def test_batches_do_not_depend_on_threads_or_hosts(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(12)]
    masks = [rng.integers(0, 6, (20 + i, 30), dtype=np.uint8) for i in range(12)]
    source = SegmentationSource(ArraySource("a", images), ArraySource("b", masks), (), IGNORE)

    def take(count, start=0, **options):
        transform = dataclasses.replace(SCALE_CROP, image_size=(16, 24))
        loader = Loader(source=source, transform=transform, seed=3, batch_size=4, **options)
        batches = loader.batches(start)
        taken = [{k: v.copy() for k, v in next(batches).items()} for _ in range(count)]
        batches.close()
        return taken

    expected = take(5)
    assert expected[0]["mask"].shape == (4, 16, 24)
    others = [take(5, threads=1), take(2, 3)]
    others.append(
        [
            {name: np.concatenate([a[name], b[name]]) for name in a}
            for a, b in zip(take(5, hosts=2), take(5, host=1, hosts=2))
        ]
    )
    for batches in others:
        for ours, theirs in zip(batches, expected[-len(batches) :], strict=True):
            for name, array in ours.items():
                np.testing.assert_array_equal(array, theirs[name])


def test_palette_pngs_are_masks(tmp_path):
    image, mask = picture()
    Image.fromarray(image).save(tmp_path / "image.png")
    palette = Image.fromarray(mask)
    palette.putpalette(bytes(range(18)))
    palette.save(tmp_path / "mask.png")
    files = ((tmp_path / name).read_bytes() for name in ("image.png", "mask.png"))
    encoded, encoded_mask = files
    ours = SCALE_CROP(encoded, np.random.default_rng(0), encoded_mask)
    theirs = SCALE_CROP(image, np.random.default_rng(0), mask)
    for name in ("image", "mask"):
        np.testing.assert_array_equal(ours[name], theirs[name])
