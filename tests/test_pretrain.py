"""Predicting all of the masked patches, or some."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.pytree import flatten

TINY = VitVariant(32, 2, 2, 4, decoder_width=16, decoder_depth=2, decoder_heads=2)
ALL = Pretrain(
    model=make_mae(TINY, grid=(4, 6)), grid=(4, 6), patch=4, mean=(0.5,) * 3, std=(0.25,) * 3
)
HALF = dataclasses.replace(ALL, predict_ratio=0.5)
KEY = jax.random.key(3)
IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def params():
    return jax.jit(ALL.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def half(params):
    """A batch of which half is predicted, its loss and gradients."""
    batch = HALF.sample(KEY, {"image": IMAGES})
    (loss, _), grads = jax.jit(jax.value_and_grad(HALF.loss, has_aux=True))(params, {}, batch)
    return batch, loss, grads


@pytest.mark.parametrize(
    ("ratio", "count"), [(1.0, 18), (0.98, 18), (0.5, 9), (0.33, 6), (0.04, 1), (1e-9, 1)]
)
def test_so_many_are_predicted(ratio, count):
    task = dataclasses.replace(ALL, predict_ratio=ratio)
    sampled = task.sample(KEY, {"image": IMAGES})
    assert task.num_predicted == count
    assert ("ids_predicted" in sampled) == (count < 18)
    assert sampled.get("ids_predicted", sampled["ids_masked"]).shape == (8, count)


@pytest.mark.parametrize("mask", ["random", "block", "grid", "user"])
def test_the_choice_is_of_every_image_and_step_and_leaves_the_mask_alone(mask):
    kinds = dict(mask=mask, user_mask=np.arange(24) % 4 > 0 if mask == "user" else None)
    whole = dataclasses.replace(ALL, **kinds).sample(KEY, {"image": IMAGES})
    half = dataclasses.replace(HALF, **kinds)
    sampled, later = (
        jax.device_get(half.sample(jax.random.fold_in(KEY, step), {"image": IMAGES}))
        for step in (0, 1)
    )
    same = jax.device_get(half.sample(KEY, {"image": IMAGES}))
    for name in ("ids_keep", "ids_masked"):
        np.testing.assert_array_equal(same[name], whole[name])
    for masked, predicted in zip(sampled["ids_masked"], sampled["ids_predicted"]):
        assert set(predicted) < set(masked)
    assert len({tuple(sorted(row)) for row in sampled["ids_predicted"]}) == 8
    assert (np.sort(later["ids_predicted"]) != np.sort(sampled["ids_predicted"])).any(axis=1).all()


def test_the_loss_is_of_the_predicted_tokens_alone(params, half):
    """Against their prediction by a decoder that is given these tokens, and nothing else."""
    batch, loss, _ = half
    patches, predicted = HALF.to_patches(IMAGES), np.asarray(batch["ids_predicted"])[..., None]
    decode = jax.jit(lambda *args: HALF.apply("__call__", *args))
    made = decode(params, patches, batch["ids_keep"], batch["ids_predicted"])
    target = np.take_along_axis(np.float64(patches), predicted, axis=1)
    target -= target.mean(axis=-1, keepdims=True)
    target /= np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + HALF.norm_pix_eps)
    np.testing.assert_allclose(loss, np.square(made - target).mean(), rtol=1e-5)


def test_nothing_depends_on_masked_patches_that_are_not_predicted(params, half):
    batch, expected, _ = half
    patches, mask = HALF.to_patches(IMAGES), HALF.sample_mask(KEY, len(IMAGES))
    loss = jax.jit(HALF.loss_of_patches)
    losses = []
    for seen in ("ids_predicted", "ids_keep", "ids_masked"):
        changed = np.array(patches)
        rows = np.arange(len(IMAGES))[:, None]
        changed[rows, batch[seen]] = np.sin(7 * changed[rows, batch[seen]])
        if seen == "ids_masked":
            changed[rows, batch["ids_predicted"]] = patches[rows, batch["ids_predicted"]]
        losses.append(loss(params, jnp.asarray(changed), mask, batch["ids_predicted"]))
    np.testing.assert_allclose(losses[2], expected, rtol=1e-6)
    assert (np.abs(np.array(losses[:2]) - expected) > 1e-4).all()


def test_every_parameter_learns(half):
    for name, grad in flatten(half[2]).items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-7, name


def test_pictures_are_whole(params):
    """The program that draws them is the same, and has all patches in it."""
    mask = HALF.sample_mask(KEY, len(IMAGES))
    assert mask.as_bool().sum() == 8 * 18
    draw = lambda task: jax.make_jaxpr(task.reconstruct)(params, IMAGES, mask)
    assert str(draw(HALF)) == str(draw(ALL))
