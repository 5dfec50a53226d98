"""The choice of an implementation of attention, and what it does where there is none."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import attention_autotune
from mae_jax.models.attention import AttentionImpl
from mae_jax.utils.errors import UserError

SHAPE = (10, 2, 8)


def test_attention_is_the_softmax_of_scaled_products():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 4, *SHAPE))
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe->bthe", weights, value)
    np.testing.assert_allclose(AttentionImpl()(query, key, value), expected, atol=1e-6)


def test_without_a_gpu_or_bfloat16_there_is_nothing_to_try(caplog):
    caplog.set_level(logging.INFO, "mae_jax.run")
    for dtype in (jnp.float32, jnp.bfloat16):
        assert attention_autotune.select_implementation("auto", {SHAPE}, dtype) == AttentionImpl()
    assert not caplog.records
    with pytest.raises(UserError, match="model.attention='cudnn' needs a GPU and .*bfloat16"):
        attention_autotune.select_implementation("cudnn", {SHAPE}, jnp.bfloat16)
    with pytest.raises(UserError, match="model.attention='flash' must be one of auto, xla, cudnn"):
        attention_autotune.select_implementation("flash", {SHAPE}, jnp.bfloat16)


def test_an_implementation_that_fails_says_why():
    trial = attention_autotune.time_cudnn(SHAPE, jnp.bfloat16)
    assert trial.seconds == math.inf
    assert trial.failure
    assert attention_autotune.time_xla(SHAPE, jnp.bfloat16).seconds < 60


def test_gradients_that_are_no_numbers_are_not_taken(monkeypatch):
    def broken(packed, gradient):
        result, backward = right(packed, gradient)
        return result, backward * jnp.nan

    right = attention_autotune._forward_backward(AttentionImpl(), SHAPE)
    ways = {AttentionImpl(): right, AttentionImpl(frozenset([SHAPE])): broken}
    monkeypatch.setattr(attention_autotune, "_forward_backward", lambda attend, shape: ways[attend])
    trial = attention_autotune.time_cudnn(SHAPE, jnp.bfloat16)
    assert trial.seconds == math.inf
    assert trial.failure == "its results or gradients are off by nan"


def test_what_fails_on_a_device_is_not_chosen(monkeypatch, caplog):
    """As on a GPU where cuDNN does not work: here there is none, and the trial is real."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    caplog.set_level(logging.INFO, "mae_jax.run")
    assert (
        attention_autotune.select_implementation("auto", {SHAPE}, jnp.bfloat16) == AttentionImpl()
    )
    [record] = caplog.records
    assert "attention of 10 tokens, 2 heads of 8: xla (xla " in record.getMessage()
    with pytest.raises(UserError, match="'cudnn' does not work for 10 tokens, 2 heads of 8: ."):
        attention_autotune.select_implementation("cudnn", {SHAPE}, jnp.bfloat16)


def test_a_shape_of_its_own_gets_cudnn():
    """Which then fails here, so it was really asked for; other shapes are XLA's."""
    attend = AttentionImpl(frozenset([SHAPE]))
    [x] = jax.random.normal(jax.random.key(0), (1, 4, *SHAPE), jnp.bfloat16)
    with pytest.raises(Exception, match="(?i)cudnn"):
        jax.block_until_ready(jax.jit(attend)(x, x, x))
    assert attend(x[:, :9], x[:, :9], x[:, :9]).shape == (4, 9, 2, 8)
