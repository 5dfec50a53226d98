"""Parameters from a checkpoint: which are taken, which stay, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import HEADS, OFFICIAL

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
    return jax.jit(task.init)(jax.random.key(0))


@pytest.fixture
def official(golden):
    return weights.read(golden / OFFICIAL, **HEADS)


def test_everything_is_taken(official):
    start = warm_start.merge(fresh(), warm_start.adapt(official, **ADAPT))
    assert (start.fresh, start.unused) == ([], [])
    for name, array in flatten(start.params).items():
        np.testing.assert_array_equal(array, official.arrays[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_tables_are_known_for_what_they_are(official, dtype):
    arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in official.arrays.items()}
    found = warm_start.adapt(dataclasses.replace(official, arrays=arrays), **ADAPT)
    assert warm_start.merge(fresh(), found).fresh == []


def test_an_encoder_alone_leaves_a_fresh_decoder(official):
    params = fresh()
    found = warm_start.adapt(weights.encoder_only(official), **ADAPT)
    start = warm_start.merge(params, found)
    assert {name.split("/")[0] for name in start.loaded} == {"encoder"}
    assert {name.split("/")[0] for name in start.fresh} == {"decoder"}
    merged, before = flatten(start.params), flatten(params)
    np.testing.assert_array_equal(merged["decoder/mask_token"], before["decoder/mask_token"])


def test_a_head_is_not_used_and_said_so(golden):
    found = weights.read(golden / "vit/v0_cls/state_dict.safetensors", heads=2)
    start = warm_start.merge(fresh(position="learned"), warm_start.adapt(found, **LEARNED))
    assert start.unused == ["head/kernel", "head/bias"]


def test_an_encoder_that_is_not_whole(golden):
    found = weights.read(golden / "vit/v0_gap/state_dict.safetensors", heads=2)
    with pytest.raises(ConvertError, match="fine-tuned with fc_norm, and so has no final norm"):
        warm_start.adapt(found, **LEARNED)


def test_another_size(official):
    wider = dataclasses.replace(SIZE, decoder_width=16)
    adapted = warm_start.adapt(official, **ADAPT)
    with pytest.raises(ConvertError, match=r"! decoder/mask_token has shape \(1, 1, 32\)") as error:
        warm_start.merge(fresh(wider), adapted)
    assert "--config.init.encoder_only=True leaves it out" in str(error.value)
    with pytest.raises(ConvertError) as error:
        warm_start.merge(fresh(dataclasses.replace(SIZE, width=64)), adapted)
    assert str(error.value).endswith(
        "--config.model.width=32 --config.model.depth=2 --config.model.heads=2 "
        "--config.model.patch=8"
    )


def test_positions(golden, official):
    """Sine-cosine tables are computed anew; others are kept, or refused, but never dropped."""
    trained = weights.read(golden / "mae/p7_eps_sensitive/state_dict.safetensors", **HEADS)
    with pytest.raises(ConvertError, match="not the sine-cosine table.*position=learned"):
        warm_start.adapt(trained, **ADAPT)
    for found in (trained, official):
        adapted = warm_start.adapt(found, image_size=(48, 32), channels=3, position="learned")
        start = warm_start.merge(fresh(position="learned", grid=(6, 4)), adapted)
        assert start.fresh == []
        assert start.params["encoder"]["pos_embed"]["table"].shape == (1, 25, 32)
