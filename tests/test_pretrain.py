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
    batch = HALF.draw(KEY, {"image": IMAGES})
    (loss, _), grads = jax.jit(jax.value_and_grad(HALF.loss, has_aux=True))(params, {}, batch)
    return batch, loss, grads


@pytest.mark.parametrize(
    ("ratio", "count"), [(1.0, 18), (0.98, 18), (0.5, 9), (0.33, 6), (0.04, 1), (1e-9, 1)]
)
def test_so_many_are_predicted(ratio, count):
    task = dataclasses.replace(ALL, predict_ratio=ratio)
    drawn = task.draw(KEY, {"image": IMAGES})
    assert task.num_predicted == count
    assert ("predicted" in drawn) == (count < 18)
    assert drawn.get("predicted", drawn["masked"]).shape == (8, count)


@pytest.mark.parametrize("mask", ["random", "block", "grid", "user"])
def test_the_choice_is_of_every_image_and_step_and_leaves_the_mask_alone(mask):
    kinds = dict(mask=mask, user_mask=np.arange(24) % 4 > 0 if mask == "user" else None)
    whole = dataclasses.replace(ALL, **kinds).draw(KEY, {"image": IMAGES})
    half = dataclasses.replace(HALF, **kinds)
    drawn, later = (
        jax.device_get(half.draw(jax.random.fold_in(KEY, step), {"image": IMAGES}))
        for step in (0, 1)
    )
    same = jax.device_get(half.draw(KEY, {"image": IMAGES}))
    for name in ("keep", "masked"):
        np.testing.assert_array_equal(same[name], whole[name])
    for masked, predicted in zip(drawn["masked"], drawn["predicted"]):
        assert set(predicted) < set(masked)
    assert len({tuple(sorted(row)) for row in drawn["predicted"]}) == 8
    assert (np.sort(later["predicted"]) != np.sort(drawn["predicted"])).any(axis=1).all()


def test_the_loss_is_of_the_predicted_tokens_alone(params, half):
    """Against their prediction by a decoder that is given these tokens, and nothing else."""
    batch, loss, _ = half
    patches, predicted = HALF.to_patches(IMAGES), np.asarray(batch["predicted"])[..., None]
    decode = jax.jit(lambda *args: HALF.apply("__call__", *args))
    made = decode(params, patches, batch["keep"], batch["predicted"])
    target = np.take_along_axis(np.float64(patches), predicted, axis=1)
    target -= target.mean(axis=-1, keepdims=True)
    target /= np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + HALF.norm_pix_eps)
    np.testing.assert_allclose(loss, np.square(made - target).mean(), rtol=1e-5)


def test_nothing_depends_on_masked_patches_that_are_not_predicted(params, half):
    batch, expected, _ = half
    patches, mask = HALF.to_patches(IMAGES), HALF.draw_mask(KEY, len(IMAGES))
    loss = jax.jit(HALF.loss_of_patches)
    losses = []
    for seen in ("predicted", "keep", "masked"):
        changed = np.array(patches)
        rows = np.arange(len(IMAGES))[:, None]
        changed[rows, batch[seen]] = np.sin(7 * changed[rows, batch[seen]])
        if seen == "masked":
            changed[rows, batch["predicted"]] = patches[rows, batch["predicted"]]
        losses.append(loss(params, jnp.asarray(changed), mask, batch["predicted"]))
    np.testing.assert_allclose(losses[2], expected, rtol=1e-6)
    assert (np.abs(np.array(losses[:2]) - expected) > 1e-4).all()


def test_every_parameter_learns(half):
    for name, grad in flatten(half[2]).items():
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-7, name


def test_pictures_are_whole(params):
    """The program that draws them is the same, and has all patches in it."""
    mask = HALF.draw_mask(KEY, len(IMAGES))
    assert mask.as_bool().sum() == 8 * 18
    draw = lambda task: jax.make_jaxpr(task.reconstruct)(params, IMAGES, mask)
    assert str(draw(HALF)) == str(draw(ALL))
