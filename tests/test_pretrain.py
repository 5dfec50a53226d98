"""Predicting all masked patches or only some of them (decoder.predict_ratio)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.pytree import flatten

TINY = VitVariant(16, 2, 2, 4, decoder_width=16, decoder_depth=1, decoder_heads=2)
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
def batch():
    """A batch of which half of the masked patches are predicted."""
    return jax.jit(HALF.sample)(KEY, {"image": IMAGES})


@pytest.fixture(scope="module")
def loss_and_grads(params, batch):
    """Loss and gradients as a jitted function of (patches, mask, ids_predicted)."""
    function = jax.jit(jax.value_and_grad(HALF.loss_of_patches))
    mask = HALF.sample_mask(KEY, len(IMAGES))
    return lambda patches: function(params, patches, mask, batch["ids_predicted"])


@pytest.mark.parametrize(
    ("ratio", "count"), [(1.0, 18), (0.98, 18), (0.5, 9), (0.33, 6), (0.04, 1), (1e-9, 1)]
)
def test_number_of_predicted_patches(ratio, count):
    task = dataclasses.replace(ALL, predict_ratio=ratio)
    assert task.num_predicted == count
    sampled = jax.eval_shape(task.sample, KEY, {"image": IMAGES})
    assert ("ids_predicted" in sampled) == (count < 18)
    assert sampled.get("ids_predicted", sampled["ids_masked"]).shape == (8, count)


@pytest.mark.parametrize("mask", ["random", "grid", "user"])
def test_predicted_patches_differ_by_image_and_step_and_masks_do_not_change(mask):
    kinds = dict(mask=mask, user_mask=np.arange(24) % 4 > 0 if mask == "user" else None)
    everything = dataclasses.replace(ALL, **kinds).sample(KEY, {"image": IMAGES})
    half = jax.jit(dataclasses.replace(HALF, **kinds).sample)
    first = jax.device_get(half(KEY, {"image": IMAGES}))
    other = jax.device_get(half(jax.random.fold_in(KEY, 1), {"image": IMAGES}))
    for name in ("ids_keep", "ids_masked"):
        np.testing.assert_array_equal(first[name], everything[name])
    for masked, predicted in zip(first["ids_masked"], first["ids_predicted"]):
        assert set(predicted) < set(masked)
    assert len({tuple(sorted(row)) for row in first["ids_predicted"]}) == 8
    first, other = (np.sort(sampled["ids_predicted"]) for sampled in (first, other))
    assert (first != other).any(axis=1).all()


def test_loss_is_the_mse_of_the_predicted_patches(params, batch, loss_and_grads):
    """Against the predictions of a decoder that gets only these mask tokens."""
    patches, predicted = HALF.to_patches(IMAGES), np.asarray(batch["ids_predicted"])[..., None]
    decode = jax.jit(lambda *args: HALF.apply("__call__", *args))
    pred = decode(params, patches, batch["ids_keep"], batch["ids_predicted"])
    target = np.take_along_axis(np.float64(patches), predicted, axis=1)
    target -= target.mean(axis=-1, keepdims=True)
    target /= np.sqrt(target.var(axis=-1, ddof=1, keepdims=True) + HALF.norm_pix_eps)
    loss, grads = loss_and_grads(patches)
    np.testing.assert_allclose(loss, np.square(pred - target).mean(), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(HALF.loss)(params, {}, batch)[0], loss, rtol=1e-6)
    for name, grad in flatten(grads).items():  # every parameter is trained
        assert np.isfinite(grad).all(), name
        assert np.abs(grad).max() > 1e-7, name


def test_loss_does_not_depend_on_other_masked_patches(batch, loss_and_grads):
    patches = HALF.to_patches(IMAGES)
    expected, _ = loss_and_grads(patches)
    losses = []
    for changed_ids in ("ids_predicted", "ids_keep", "ids_masked"):
        changed = np.array(patches)
        rows = np.arange(len(IMAGES))[:, None]
        changed[rows, batch[changed_ids]] = np.sin(7 * changed[rows, batch[changed_ids]])
        if changed_ids == "ids_masked":
            changed[rows, batch["ids_predicted"]] = patches[rows, batch["ids_predicted"]]
        losses.append(loss_and_grads(jnp.asarray(changed))[0])
    np.testing.assert_allclose(losses[2], expected, rtol=1e-6)
    assert (np.abs(np.array(losses[:2]) - expected) > 1e-4).all()


def test_reconstruction_predicts_all_patches(params):
    """The program does not depend on predict_ratio."""
    mask = HALF.sample_mask(KEY, len(IMAGES))
    assert mask.as_bool().sum() == 8 * 18
    program = lambda task: jax.make_jaxpr(task.reconstruct)(params, IMAGES, mask)
    assert str(program(HALF)) == str(program(ALL))
