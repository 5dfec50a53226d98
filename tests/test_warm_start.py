"""Warm start: which arrays are loaded, missing and unexpected, and what is an error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL

from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train import warm_start
from mae_jax.utils.pytree import flatten

SIZE = VitVariant(32, 2, 2, 8, decoder_width=32, decoder_depth=1, decoder_heads=2)
ADAPT = dict(image_size=(32, 32), channels=3, position="sincos")
LEARNED = ADAPT | dict(position="learned")


def fresh(size=SIZE, position="sincos", grid=(4, 4)):
    model = make_mae(size, grid=grid, pos_embed=position)
    task = Pretrain(model=model, grid=grid, patch=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    rng = np.random.default_rng(0)  # values do not matter here, so that nothing is compiled
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture
def official(golden):
    return weights.read(golden / OFFICIAL, **HEADS)


def test_every_array_is_loaded(official):
    start = warm_start.merge(fresh(), warm_start.adapt(official, **ADAPT))
    assert (start.missing, start.unexpected) == ([], [])
    for name, array in flatten(start.params).items():
        np.testing.assert_array_equal(array, official.arrays[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sincos_tables_are_recognized(official, dtype):
    arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in official.arrays.items()}
    found = warm_start.adapt(dataclasses.replace(official, arrays=arrays), **ADAPT)
    assert warm_start.merge(fresh(), found).missing == []


def test_an_encoder_alone_leaves_a_fresh_decoder(official):
    params = fresh()
    found = warm_start.adapt(weights.encoder_only(official), **ADAPT)
    start = warm_start.merge(params, found)
    assert {name.split("/")[0] for name in start.loaded} == {"encoder"}
    assert {name.split("/")[0] for name in start.missing} == {"decoder"}
    merged, before = flatten(start.params), flatten(params)
    np.testing.assert_array_equal(merged["decoder/mask_token"], before["decoder/mask_token"])


def test_a_head_is_unexpected(golden):
    found = weights.read(golden / "vit/v0_cls/state_dict.safetensors", heads=2)
    start = warm_start.merge(fresh(position="learned"), warm_start.adapt(found, **LEARNED))
    assert start.unexpected == ["head/kernel", "head/bias"]


def test_an_encoder_without_its_final_norm_is_an_error(golden):
    found = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    with pytest.raises(ConvertError, match="fine-tuned with fc_norm, so it has no final norm"):
        warm_start.adapt(found, **LEARNED)


def test_another_size(official):
    wider = dataclasses.replace(SIZE, decoder_width=16)
    adapted = warm_start.adapt(official, **ADAPT)
    with pytest.raises(ConvertError, match=r"! decoder/mask_token has shape \(1, 1, 32\)") as error:
        warm_start.merge(fresh(wider), adapted)
    assert "--config.init.encoder_only=True ignores it" in str(error.value)
    with pytest.raises(ConvertError) as error:
        warm_start.merge(fresh(dataclasses.replace(SIZE, width=64)), adapted)
    assert str(error.value).endswith(
        "--config.model.width=32 --config.model.depth=2 --config.model.heads=2 "
        "--config.model.patch=8"
    )


def test_positions(official):
    """Sine-cosine tables are recomputed; others are kept or an error, but never dropped."""
    moved = {n: x + 0.1 for n, x in official.arrays.items() if n.endswith("pos_embed/table")}
    trained = dataclasses.replace(official, arrays=official.arrays | moved)
    with pytest.raises(ConvertError, match="not the sine-cosine table.*position=learned"):
        warm_start.adapt(trained, **ADAPT)
    for found in (trained, official):
        adapted = warm_start.adapt(found, image_size=(48, 32), channels=3, position="learned")
        start = warm_start.merge(fresh(position="learned", grid=(6, 4)), adapted)
        assert start.missing == []
        assert start.params["encoder"]["pos_embed"]["table"].shape == (1, 25, 32)
