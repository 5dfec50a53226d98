"""Switches that must change neither the numbers nor the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VARIANTS, VitVariant, get_variant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import diff

TINY = VitVariant(32, 4, 2, 8, decoder_width=16, decoder_depth=2, decoder_heads=2)


def make_task(execution=ExecutionConfig(), grid=(3, 4), channels=5, **kwargs):
    model = make_mae(TINY, grid=grid, channels=channels, execution=execution)
    return Pretrain(
        model=model,
        grid=grid,
        patch=TINY.patch,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        **kwargs,
    )


def loss_and_grads(task, params):
    images = jax.random.randint(jax.random.key(2), (6, 24, 32, 5), 0, 256, jnp.int32)
    batch = task.sample(jax.random.key(3), {"image": images.astype(jnp.uint8)})
    (loss, _), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, {}, batch)
    return loss, grads


@pytest.fixture(scope="module")
def plain():
    task = make_task()
    params = jax.jit(task.init)(jax.random.key(1))
    return params, *loss_and_grads(task, params)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(scan_unroll=2),
        ExecutionConfig(scan_unroll=100),
        ExecutionConfig(remat="full"),
        ExecutionConfig(remat="dots"),
        ExecutionConfig(remat="full", scan_unroll=4),
    ],
    ids=lambda execution: f"{execution.remat}, unroll {execution.scan_unroll}",
)
def test_unrolling_and_remat_change_nothing(plain, execution):
    params, loss, grads = plain
    task = make_task(execution)
    assert diff(params, jax.eval_shape(task.init, jax.random.key(1))) == []
    new_loss, new_grads = loss_and_grads(task, params)
    np.testing.assert_allclose(new_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, new_grads)


def test_bfloat16_is_close_and_keeps_float32_where_it_matters(plain):
    params, loss, grads = plain
    task = make_task(ExecutionConfig(dtype=jnp.bfloat16))
    shapes = jax.eval_shape(task.init, jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    new_loss, new_grads = loss_and_grads(task, params)
    assert new_loss.dtype == jnp.float32
    np.testing.assert_allclose(new_loss, loss, rtol=2e-2)
    assert {g.dtype for g in jax.tree.leaves(new_grads)} == {jnp.dtype("float32")}
    images = jnp.zeros((2, 24, 32, 5), jnp.uint8)
    text = str(jax.make_jaxpr(lambda p: task.features(p, images))(params))
    for line in text.splitlines():
        if " exp " in line or "rsqrt" in line:  # softmax and norms
            assert "bf16" not in line, line


@pytest.mark.parametrize("name", VARIANTS)
def test_paper_sizes_have_the_papers_parameter_counts(name):
    size = get_variant(name)
    side = 224 // size.patch
    task = Pretrain(
        model=make_mae(size, grid=(side, side)),
        grid=(side, side),
        patch=size.patch,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    millions = [
        sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) / 1e6
        for part in ("encoder", "decoder")
    ]
    expected = {
        "vit_b16": [85.65, 26.01],
        "vit_l16": [303.10, 26.14],
        "vit_h14": [630.44, 26.18],
        "vit_s16": [21.59, 3.46],
        "vit_ti16": [5.49, 3.41],
    }
    np.testing.assert_allclose(millions, expected[name], atol=0.006)


def test_images_are_masked_independently_and_the_kept_ones_decide_everything():
    """What lies under the mask must not reach the prediction."""
    task = make_task()
    params = jax.jit(task.init)(jax.random.key(1))
    images = jax.random.randint(jax.random.key(2), (2, 24, 32, 5), 0, 256, jnp.int32)
    patches = task.to_patches(images.astype(jnp.uint8))
    mask = task.sample_mask(jax.random.key(3), 2)
    hidden = mask.as_bool()[..., None]
    pred = task.apply("predict", params, patches, *mask)
    scrambled = jnp.where(hidden, 17.0, patches)
    np.testing.assert_array_equal(task.apply("predict", params, scrambled, *mask), pred)
    visible = jnp.where(hidden, patches, 17.0)
    assert jnp.abs(task.apply("predict", params, visible, *mask) - pred).max() > 1e-3


def test_bad_model_values():
    with pytest.raises(UserError, match="is not divisible"):
        make_mae(VitVariant(30, 1, 4, 8), grid=(2, 2))
    with pytest.raises(UserError, match="model.position='rotary'"):
        make_mae(TINY, grid=(2, 2), pos_embed="rotary")
    with pytest.raises(UserError, match="model.remat='half'"):
        ExecutionConfig(remat="half")
    with pytest.raises(UserError, match="mask.kind='stripes'"):
        make_task(mask="stripes")
    with pytest.raises(UserError, match="unknown model size 'vit_b32'"):
        get_variant("vit_b32")


def test_reconstruction_uses_true_or_visible_statistics(plain):
    """True ones change with what is masked, those of visible patches do not."""
    task = make_task(norm_pix=True)
    params, *_ = plain
    mask = task.sample_mask(jax.random.key(3), 1)
    hidden = mask.as_bool().reshape(3, 4).repeat(8, axis=0).repeat(8, axis=1)[..., None]
    image = np.linspace(20, 220, 24 * 32).reshape(24, 32, 1).repeat(5, axis=-1)
    images = jnp.array([image, np.where(hidden, image / 2, image), np.full_like(image, 90)])
    images = images.astype(jnp.uint8)
    masks = jax.tree.map(lambda x: x.repeat(3, axis=0), mask)
    reconstruct = lambda params, stats: task.reconstruct(params, images, masks, stats)
    made = jax.jit(lambda params: [reconstruct(params, stats) for stats in ("gt", "visible")])
    true, visible = np.array(made(params))
    assert true.dtype == visible.dtype == np.uint8
    true, visible = np.int32(true), np.int32(visible)
    assert np.abs(true[0] - visible[0]).mean() > 5
    np.testing.assert_array_equal(visible[1], visible[0])
    darker = np.where(hidden, true[0] - true[1], 0)
    assert darker.sum() / (5 * hidden.sum()) > 20
    np.testing.assert_array_equal(true[0] - true[1], darker)
    for constant in (true[2], visible[2]):  # has the same statistics everywhere
        assert abs(constant.max() - 90) <= 1
    with pytest.raises(UserError, match="stats='none'"):
        reconstruct(params, "none")
