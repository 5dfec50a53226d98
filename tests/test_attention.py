"""Attention, and the selection of its implementation where cuDNN is not available."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import attention_autotune
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.attention_autotune import select_implementation
from mae_jax.utils.errors import UserError

SHAPE = (10, 2, 8)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(attention_autotune, "CALLS", 2)
    monkeypatch.setattr(attention_autotune, "REPEATS", 1)


def test_attention_is_the_softmax_of_scaled_products():
    query, key, value = np.random.default_rng(0).normal(size=(3, 4, *SHAPE)).astype(np.float32)
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe->bthe", weights, value)
    actual = AttentionImpl()(*map(jnp.asarray, (query, key, value)))
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_without_a_gpu_or_bfloat16_nothing_is_timed(caplog):
    caplog.set_level(logging.INFO, "mae_jax.run")
    for dtype in (jnp.float32, jnp.bfloat16):
        assert select_implementation("auto", {SHAPE}, dtype) == AttentionImpl()
    assert not caplog.records
    with pytest.raises(UserError, match="model.attention='cudnn' needs a GPU and .*bfloat16"):
        select_implementation("cudnn", {SHAPE}, jnp.bfloat16)
    with pytest.raises(UserError, match="model.attention='flash' must be one of auto, xla, cudnn"):
        select_implementation("flash", {SHAPE}, jnp.bfloat16)


def test_nan_gradients_are_a_failure(monkeypatch):
    def broken(qkv, gradient):
        result, dqkv = correct(qkv, gradient)
        return result, dqkv * jnp.nan

    correct = attention_autotune._forward_backward(AttentionImpl(), SHAPE)
    passes = {AttentionImpl(): correct, AttentionImpl(frozenset([SHAPE])): broken}
    monkeypatch.setattr(attention_autotune, "_forward_backward", lambda impl, shape: passes[impl])
    timing = attention_autotune.time_cudnn(SHAPE, jnp.bfloat16)
    assert timing.seconds == math.inf
    assert timing.failure == "its results or gradients are off by nan"


def test_an_implementation_that_fails_is_not_selected(monkeypatch, caplog):
    """As on a GPU where cuDNN does not work: there is none here, so it really fails."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    caplog.set_level(logging.INFO, "mae_jax.run")
    assert select_implementation("auto", {SHAPE}, jnp.bfloat16) == AttentionImpl()
    [record] = caplog.records
    assert "attention of 10 tokens, 2 heads of 8: xla (xla " in record.getMessage()
    assert " ms, cudnn " in record.getMessage()  # XLA has a time, cuDNN an error
    with pytest.raises(UserError, match="'cudnn' does not work for 10 tokens, 2 heads of 8: ."):
        select_implementation("cudnn", {SHAPE}, jnp.bfloat16)


def test_cudnn_is_used_for_its_shapes_only():
    """It fails on a CPU, which shows that it was called."""
    attention = AttentionImpl(frozenset([SHAPE]))
    x = jnp.ones((4, *SHAPE), jnp.bfloat16)
    with pytest.raises(Exception, match="(?i)cudnn"):
        jax.block_until_ready(jax.jit(attention)(x, x, x))
    assert attention(x[:, :9], x[:, :9], x[:, :9]).shape == (4, 9, 2, 8)
