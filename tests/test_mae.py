"""The MAE: execution options that must not change results, parameter counts, information flow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.models.layers import ExecutionConfig, fold_norms
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VARIANTS, VitVariant, get_variant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import diff, flatten

TINY = VitVariant(16, 4, 2, 8, decoder_width=16, decoder_depth=2, decoder_heads=2)


def make_task(variant=TINY, grid=(3, 4), channels=5, execution=ExecutionConfig(), **kwargs):
    pos_embed = kwargs.pop("pos_embed", "sincos")
    model = make_mae(
        variant, grid=grid, channels=channels, pos_embed=pos_embed, execution=execution
    )
    return Pretrain(
        model=model,
        grid=grid,
        patch=variant.patch,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        **kwargs,
    )


TASK = make_task()


@pytest.fixture(scope="module")
def params():
    return jax.jit(TASK.init)(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(2).integers(0, 256, (6, 24, 32, 5), dtype=np.uint8)
    return jax.jit(TASK.sample)(jax.random.key(3), {"image": images})


def loss_and_grads(task, params, batch):
    (loss, _), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(params, {}, batch)
    return loss, grads


@pytest.fixture(scope="module")
def expected(params, batch):
    return loss_and_grads(TASK, params, batch)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("encoder/cls_token", -0.1350959743722342),
        ("encoder/patch_embed/kernel", -7.785140882335327),
        ("encoder/blocks/attn/qkv/kernel", 6.184272863974911),
        ("decoder/mask_token", 0.03687392210122198),
        ("decoder/blocks/mlp/fc2/kernel", -4.309577186162642),
    ],
)
def test_a_seed_has_the_weights_of_earlier_versions(params, name, total):
    """Sums over arrays, recorded with version 0.1.0."""
    assert np.asarray(flatten(params)[name], np.float64).sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "execution",
    [
        ExecutionConfig(remat="dots", scan_unroll=2),
        ExecutionConfig(remat="full", scan_unroll=100),
    ],
    ids=lambda execution: f"{execution.remat}, unroll {execution.scan_unroll}",
)
def test_unrolling_and_rematerialization_do_not_change_results(params, batch, expected, execution):
    task = make_task(execution=execution)
    assert diff(params, jax.eval_shape(task.init, jax.random.key(1))) == []
    loss, grads = loss_and_grads(task, params, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected[1])


def test_mixed_precision_is_close_and_keeps_float32_where_needed(params, batch, expected):
    task = make_task(execution=ExecutionConfig(dtype=jnp.bfloat16))
    shapes = jax.eval_shape(task.init, jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    loss, grads = loss_and_grads(task, params, batch)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected[0], rtol=2e-2)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(lambda p: task.features(p, batch["image"]))(params))
    for line in text.splitlines():
        if " exp " in line or "rsqrt" in line:  # softmax and norms
            assert "bf16" not in line, line


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_the_forms_for_accelerators_compute_the_same(
    dtype, tolerance, backend, params, batch, monkeypatch
):
    """Norms, which are folded, GELU and bias gradients; relative to the norm of all gradients.

    The norms are not at their initial scale of 1 and bias of 0.
    """
    noisy = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    params = jax.tree_util.tree_map_with_path(noisy, params)
    norms = flatten(fold_norms(params))
    assert (norms["encoder/blocks/norm1/scale"] == 1).all()
    assert (norms["decoder/blocks/norm2/bias"] == 0).all()
    execution = ExecutionConfig(dtype=dtype)
    expected_loss, expected = loss_and_grads(make_task(execution=execution), params, batch)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    loss, grads = loss_and_grads(make_task(execution=execution), params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    error = optax.tree.norm(jax.tree.map(jnp.subtract, grads, expected))
    assert error <= tolerance * optax.tree.norm(expected)


def test_gradients_of_tokens_and_positions_are_summed_in_float32(params, batch):
    """In bfloat16, sums over many tokens would lose small terms: 1 + 2**-9 is 1."""
    task = make_task(execution=ExecutionConfig(dtype=jnp.bfloat16), pos_embed="learned")
    params = jax.eval_shape(task.init, jax.random.key(1))
    loss = lambda params: task.loss(params, {}, batch)[0]
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    text = str(jaxpr)
    assert "bf16" in text
    for line in text.splitlines():
        if "reduce_sum" in line or "scatter-add" in line:
            assert ":bf16" not in line.split("=")[0], line


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts_of_the_variants(name):
    variant = get_variant(name)
    side = 224 // variant.patch
    task = make_task(variant, grid=(side, side), channels=3)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    millions = [
        sum(leaf.size for leaf in jax.tree.leaves(shapes[part])) / 1e6
        for part in ("encoder", "decoder")
    ]
    expected = {
        "vit_b16": [85.65, 26.01],
        "vit_l16": [303.10, 26.14],
        "vit_h14": [630.44, 26.18],
        "vit_h16": [630.68, 101.93],
        "vit_1b16": [1361.11, 102.06],
        "vit_5b16": [5440.13, 102.85],
        "vit_s16": [21.59, 3.46],
        "vit_ti16": [5.49, 3.41],
    }
    np.testing.assert_allclose(millions, expected[name], atol=0.006)


def test_predictions_depend_on_the_kept_patches_alone(params, batch):
    patches = TASK.to_patches(batch["image"])
    mask = TASK.sample_mask(jax.random.key(3), len(patches))
    masked = mask.as_bool()[..., None]
    predict = jax.jit(lambda patches: TASK.apply("predict", params, patches, *mask))
    pred = predict(patches)
    np.testing.assert_array_equal(predict(jnp.where(masked, 17.0, patches)), pred)
    assert jnp.abs(predict(jnp.where(masked, patches, 17.0)) - pred).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task(VitVariant(30, 1, 4, 8)), "width=30 is not divisible by model.heads=4"),
        (lambda: make_task(VitVariant(6, 1, 2, 8)), "model.width=6 is not divisible by 4"),
        (lambda: make_mae(TINY, grid=(2, 2), pos_embed="rotary"), "model.position='rotary'"),
        (lambda: ExecutionConfig(remat="half"), "model.remat='half'"),
        (lambda: ExecutionConfig(scan_unroll=0), "model.scan_unroll=0"),
        (lambda: make_task(mask="stripes"), "mask.kind='stripes'"),
        (lambda: make_task(mask="user"), "mask.kind='user' needs a mask file: set mask.path"),
        (lambda: make_task(user_mask=np.arange(12) < 4), "mask.kind='random' does not use"),
        (lambda: get_variant("vit_b32"), "unknown model size 'vit_b32'"),
    ],
)
def test_invalid_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_reconstruction_with_true_or_visible_patch_statistics(params):
    """True statistics change with masked pixels; those of visible patches do not."""
    mask = TASK.sample_mask(jax.random.key(3), 1)
    masked = mask.as_bool().reshape(3, 4).repeat(8, axis=0).repeat(8, axis=1)[..., None]
    image = np.linspace(20, 220, 24 * 32).reshape(24, 32, 1).repeat(5, axis=-1)
    images = jnp.array([image, np.where(masked, image / 2, image), np.full_like(image, 90)])
    images = images.astype(jnp.uint8)
    masks = jax.tree.map(lambda x: x.repeat(3, axis=0), mask)
    reconstruct = lambda params, stats: TASK.reconstruct(params, images, masks, stats)
    both = jax.jit(lambda params: [reconstruct(params, stats) for stats in ("gt", "visible")])
    true, visible = np.array(both(params))
    assert true.dtype == visible.dtype == np.uint8
    true, visible = np.int32(true), np.int32(visible)
    assert np.abs(true[0] - visible[0]).mean() > 5
    np.testing.assert_array_equal(visible[1], visible[0])
    darker = np.where(masked, true[0] - true[1], 0)
    assert darker.sum() / (5 * masked.sum()) > 20
    np.testing.assert_array_equal(true[0] - true[1], darker)
    for constant in (true[2], visible[2]):  # has the same statistics everywhere
        assert abs(constant.max() - 90) <= 1
    with pytest.raises(UserError, match="stats='none' must be 'gt' or 'visible'"):
        reconstruct(params, "none")
