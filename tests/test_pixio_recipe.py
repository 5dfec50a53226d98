"""Pixio's recipe, and what several class tokens, cells of masks and drop path change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pixio
from mae_jax.distributed import sharding
from mae_jax.models.classifier import Classifier
from mae_jax.models.image_ops import normalize
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patchify
from mae_jax.models.variants import VitVariant, get_variant
from mae_jax.models.vit import make_encoder
from mae_jax.tasks import masking
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.masking import Mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train import build_model
from mae_jax.train.config import from_config_dict
from mae_jax.utils.errors import UserError


@pytest.mark.parametrize(
    ("size", "batch_size", "steps", "warmup"),
    [
        ("vit_h16", 8192, 642000, 64200),
        ("vit_1b16", 8192, 642000, 64200),
        ("vit_5b16", 16384, 1284000, 128400),
        ("vit_b16", 8192, 642000, 64200),
        ("vit_l16", 8192, 642000, 64200),
    ],
)
def test_recipe(size, batch_size, steps, warmup):
    config = from_config_dict(pixio.get_config(size))
    length = build_model.make_run_length(config, num_images=13_000_000)
    assert (config.batch_size, length.total_steps, length.warmup_steps) == (
        batch_size,
        steps,
        warmup,
    )
    rate = build_model.make_learning_rate(config, length)
    np.testing.assert_allclose(
        [rate(0), rate(warmup), rate(steps)], [0, 8e-4, 0], rtol=1e-6, atol=1e-12
    )
    task = build_model.make_task(config, sharding.make_mesh(1), ())
    assert isinstance(task, Pretrain)
    encoder, decoder, variant = task.model.encoder, task.model.decoder, get_variant(size)
    assert (encoder.width, encoder.depth, encoder.num_heads, task.patch) == (
        variant.width,
        variant.depth,
        variant.heads,
        16,
    )
    assert (decoder.width, decoder.depth, decoder.num_heads) == (512, 32, 16)
    assert encoder.class_tokens == decoder.class_tokens == 8
    assert encoder.pos_embed == decoder.pos_embed == "learned_random"
    assert (encoder.drop_path, encoder.layer_norm_eps) == (0.4, 1e-6)
    assert (task.mask, task.mask_cell, task.mask_ratio, task.num_kept) == ("random", 4, 0.75, 64)
    assert task.norm_pix
    assert (config.data.augment, config.data.crop_scale, config.data.flip) == (
        "crop",
        (0.2, 1.0),
        False,
    )
    optim = config.optim
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.95, 1e-8, 0.05)
    assert optim.decay_embeddings
    assert optim.clip_norm is None


TINY = VitVariant(16, 3, 2, 8, decoder_width=16, decoder_depth=1, decoder_heads=2, class_tokens=3)


def tiny_task(grid=(8, 8), drop_path=0.0, **options):
    model = make_mae(TINY, grid=grid, pos_embed="learned_random", drop_path=drop_path)
    return Pretrain(model=model, grid=grid, patch=8, mean=(0.5,) * 3, std=(0.25,) * 3, **options)


def test_pooling_and_attention_of_several_class_tokens():
    """A head takes the mean of the class tokens; attention is the mean over them, as a map."""
    encoder = make_encoder(TINY, (2, 3), pos_embed="learned_random")
    patches = jax.random.normal(jax.random.key(1), (2, 6, 192))
    model = Classifier(encoder, pool="cls")
    variables = model.init(jax.random.key(0), patches)
    outputs = jax.jit(lambda v, x: model.apply(v, x, return_intermediates=True))(variables, patches)
    assert outputs.tokens.shape == (2, 9, 16)
    np.testing.assert_allclose(outputs.pooled, outputs.tokens[:, :3].mean(axis=1), rtol=1e-6)
    for pool, expected in (
        ("mean", outputs.tokens[:, 3:].mean(axis=1)),
        ("attention", outputs.tokens[:, 3:]),
        ("grid", outputs.tokens[:, 3:].reshape(2, 2, 3, 16)),
    ):
        pooled = Classifier(encoder, pool=pool).pool_tokens(outputs.tokens)
        np.testing.assert_allclose(pooled, expected, rtol=1e-6)
    np.testing.assert_allclose(outputs.intermediates.attention.sum(axis=-1), 1, rtol=1e-5)
    heads = outputs.intermediates.head_attention
    assert heads.shape == (3, 2, 2, 9)
    np.testing.assert_allclose(heads.mean(axis=2), outputs.intermediates.attention, rtol=1e-5)


def test_tasks_with_labels_compare_the_global_feature():
    model = Classifier(make_encoder(TINY, (2, 2), pos_embed="learned"), num_classes=2)
    task = Classify(model=model, patch=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = jax.random.randint(jax.random.key(1), (2, 16, 16, 3), 0, 255, jnp.uint8)
    params = task.init(jax.random.key(0))
    patches = patchify(normalize(images, task.mean, task.std), task.patch)
    before_norm = make_encoder(TINY, (2, 2), pos_embed="learned", final_norm=False)
    inside = {name: x for name, x in params["encoder"].items() if name != "norm"}
    tokens = jax.jit(before_norm.apply)({"params": inside}, patches)
    features = jax.jit(task.features)(params, images)
    np.testing.assert_allclose(features, tokens[:, :3].mean(axis=1), rtol=1e-5, atol=1e-6)
    assert task.attention_shapes == {(7, 2, 8)}


def test_shapes_of_attention_count_all_class_tokens():
    task = tiny_task(mask_cell=4, predict_ratio=0.5)
    assert task.attention_shapes == {(67, 2, 8), (19, 2, 8), (43, 2, 8)}


def test_cells_of_rectangular_images_are_hidden_as_a_whole():
    task = tiny_task(grid=(8, 12), mask_cell=4)
    mask = task.sample_mask(jax.random.key(0), 16)
    hidden = np.asarray(mask.as_bool()).reshape(16, 2, 4, 3, 4)
    cells = hidden.any(axis=(2, 4))
    assert (cells == hidden.all(axis=(2, 4))).all()
    assert (cells.sum(axis=(1, 2)) == 5).all()  # int(6 * 0.25) = 1 stays
    assert task.num_kept == 16
    assert len({tuple(row.ravel()) for row in cells}) > 1


def test_masks_with_cells_of_one_patch_are_those_without():
    key = jax.random.key(3)
    mask = tiny_task().sample_mask(key, 4)
    for ids, expected in zip(masking.cell_mask(mask, (8, 8), 1), mask):
        np.testing.assert_array_equal(ids, expected)


def test_the_ratio_counts_cells():
    assert tiny_task(grid=(6, 6), mask_cell=2).num_kept == 2 * 4  # int(9 * 0.25) = 2 cells


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny_task(grid=(14, 14), mask_cell=4),
            "mask.cell=4 does not divide the 14x14 patches of an image: use mask.cell=1 or 2 or "
            "7, or model.image_size with a height of 96 or 128 and a width of 96 or 128",
        ),
        (lambda: tiny_task(mask_cell=0), "mask.cell=0 must be at least 1"),
        (lambda: tiny_task(mask_cell=4, mask="grid"), "mask.cell=4 is for mask.kind='random'"),
        (lambda: tiny_task(mask_cell=4, mask="block"), "mask.cell=4 is for mask.kind='random'"),
        (
            lambda: tiny_task(mask_cell=2, mask="user", user_mask=np.arange(64) < 32),
            "mask.cell=2 is for mask.kind='random'",
        ),
        (
            lambda: tiny_task(mask_cell=4, mask_ratio=0.9),
            "mask.ratio=0.9 keeps 0 of 4 cells",
        ),
        (
            lambda: make_mae(dataclasses.replace(TINY, class_tokens=0), grid=(2, 2)),
            "model.class_tokens=0 must be at least 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)


def test_drop_path_leaves_the_other_random_streams_alone():
    batch = {"image": jnp.zeros((4, 64, 64, 3), jnp.uint8)}
    key = jax.random.key(0)
    plain = tiny_task(predict_ratio=0.5, mask_cell=2).sample(key, batch)
    dropped = tiny_task(predict_ratio=0.5, mask_cell=2, drop_path=0.4).sample(key, batch)
    noise = dropped.pop("drop_path_noise")
    assert noise.shape == (4, 3, 2)
    assert plain.keys() == dropped.keys() == {*batch, *Mask._fields, "ids_predicted"}
    for name, array in plain.items():
        np.testing.assert_array_equal(dropped[name], array)


def test_some_patches_of_hidden_cells_can_be_predicted():
    task = tiny_task(predict_ratio=0.5, mask_cell=4)
    batch = {"image": jax.random.randint(jax.random.key(1), (2, 64, 64, 3), 0, 255, jnp.uint8)}
    sampled = task.sample(jax.random.key(2), batch)
    assert sampled["ids_predicted"].shape == (2, 24)
    for row, hidden in zip(sampled["ids_predicted"], sampled["ids_masked"]):
        assert set(np.asarray(row).tolist()) < set(np.asarray(hidden).tolist())
    loss, _ = jax.jit(task.loss)(task.init(jax.random.key(0)), {}, sampled)
    assert np.isfinite(loss)
