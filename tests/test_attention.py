"""Attention, and the selection of its implementation where cuDNN is not available."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models import attention_selection
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.attention_selection import select_implementation, try_fused
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.vit import Encoder
from mae_jax.utils.errors import UserError

SHAPE = (10, 2, 8)
ODD = (9, 2, 8)


def test_attention_is_the_softmax_of_scaled_products():
    query, key, value = np.random.default_rng(0).normal(size=(3, 4, *SHAPE)).astype(np.float32)
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshe->bthe", weights, value)
    actual = AttentionImpl()(*map(jnp.asarray, (query, key, value)), tokens=SHAPE[0])
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("kept", [8, 9], ids=["9 tokens", "10 tokens"])
def test_padded_blocks_compute_the_same(kept):
    """With jax's own attention as the fused kernel, which takes masked keys as cuDNN does."""
    rng = np.random.default_rng(0)
    patches = jnp.asarray(rng.normal(size=(3, 12, 5)), jnp.float32)
    ids_keep = jnp.asarray([rng.permutation(12)[:kept] for _ in range(3)])
    shape = (1 + kept, 2, 8)
    attentions = AttentionImpl(), AttentionImpl(frozenset([shape]), kernel="xla")
    assert attentions[1].padding(shape) == kept % 2 ^ 1
    encoders = [
        Encoder(16, 2, 2, (3, 4), execution=ExecutionConfig(attention=attention))
        for attention in attentions
    ]
    params = jax.jit(encoders[0].init)(jax.random.key(0), patches)["params"]
    gradient = jnp.asarray(rng.normal(size=(3, 1 + kept, 16)), jnp.float32)

    def run(encoder):
        apply = lambda params, patches: encoder.apply({"params": params}, patches, ids_keep)
        tokens, vjp = jax.vjp(apply, params, patches)
        return tokens, vjp(gradient)

    expected, actual = (jax.jit(run, static_argnums=0)(encoder) for encoder in encoders)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * jnp.abs(b).max())


def test_intermediates_have_no_padding():
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)
    fused = AttentionImpl(frozenset([(5, 2, 8)]), kernel="xla")
    plain, padded = (
        Encoder(16, 2, 2, (2, 2), execution=ExecutionConfig(attention=attention))
        for attention in (AttentionImpl(), fused)
    )
    variables = plain.init(jax.random.key(0), patches)
    expected, actual = (
        encoder.apply(variables, patches, return_intermediates=True, method="with_global_feature")
        for encoder in (plain, padded)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


def test_without_a_suitable_gpu_or_bfloat16_xla_is_selected(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "mae_jax.run")
    assert select_implementation("auto", {SHAPE}, jnp.bfloat16) == AttentionImpl()
    monkeypatch.setattr(attention_selection, "_compute_capability", lambda: (7, 5))
    assert select_implementation("auto", {SHAPE}, jnp.bfloat16) == AttentionImpl()
    monkeypatch.setattr(attention_selection, "_compute_capability", lambda: (8, 0))
    assert select_implementation("auto", {SHAPE}, jnp.float32) == AttentionImpl()
    assert not caplog.records
    with pytest.raises(UserError, match="model.attention='cudnn' needs an NVIDIA GPU .*bfloat16"):
        select_implementation("cudnn", {SHAPE}, jnp.float32)
    with pytest.raises(UserError, match="model.attention='flash' must be one of auto, xla, cudnn"):
        select_implementation("flash", {SHAPE}, jnp.bfloat16)


def test_a_kernel_that_fails_is_not_selected(monkeypatch, caplog):
    """As on a GPU where cuDNN does not work: there is none here, so it really fails."""
    monkeypatch.setattr(attention_selection, "_compute_capability", lambda: (9, 0))
    assert select_implementation("auto", {SHAPE}, jnp.bfloat16) == AttentionImpl()
    [record] = caplog.records
    assert "fused attention does not work for 10 tokens, 2 heads of 8: " in record.getMessage()
    with pytest.raises(UserError, match="'cudnn' does not work for 10 tokens, 2 heads of 8: ."):
        select_implementation("cudnn", {SHAPE}, jnp.bfloat16)


def test_kernels_that_work_are_selected(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mae_jax.run")
    monkeypatch.setattr(attention_selection, "_compute_capability", lambda: (8, 0))
    monkeypatch.setattr(attention_selection, "try_fused", lambda *_: "")
    selected = select_implementation("auto", {SHAPE, ODD}, jnp.bfloat16)
    assert selected == AttentionImpl(frozenset([SHAPE, ODD]))
    assert "9 tokens, 2 heads of 8; 10 tokens, 2 heads of 8" in caplog.text


@pytest.mark.parametrize("shape", [SHAPE, ODD])
def test_a_trial_compares_results_and_gradients(shape, monkeypatch):
    assert try_fused(shape, jnp.float32, kernel="xla") == ""
    run = attention_selection._outputs_and_gradients

    def broken(attention, shape, dtype):
        output, dquery, dkey, dvalue = run(attention, shape, dtype)
        return output, dquery, dkey, dvalue * (np.nan if attention.fused_shapes else 1)

    monkeypatch.setattr(attention_selection, "_outputs_and_gradients", broken)
    failure = try_fused(shape, jnp.float32, kernel="xla")
    assert failure == "its results or gradients are off by nan"


def test_fused_kernels_are_used_for_their_shapes_only():
    """cuDNN fails on a CPU, which shows that it was called."""
    attention = AttentionImpl(frozenset([SHAPE]))
    x = jnp.ones((4, *SHAPE), jnp.bfloat16)
    with pytest.raises(Exception, match="(?i)cudnn"):
        jax.block_until_ready(jax.jit(attention, static_argnums=3)(x, x, x, 10))
    assert attention(x[:, :9], x[:, :9], x[:, :9], 9).shape == (4, 9, 2, 8)


def test_tpus_have_a_kernel_of_their_own(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mae_jax.run")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(attention_selection, "try_fused", lambda shape, dtype, kernel: "")
    selected = select_implementation("auto", {ODD}, jnp.bfloat16)
    assert selected == AttentionImpl(frozenset([ODD]), "tpu")
    assert selected.padding(ODD) == 7
    assert "fused attention (Pallas) of 9 tokens, 2 heads of 8" in caplog.text
    assert select_implementation("auto", {ODD}, jnp.float32) == AttentionImpl()
    with pytest.raises(UserError, match="model.attention='cudnn' needs an NVIDIA GPU"):
        select_implementation("cudnn", {ODD}, jnp.bfloat16)
