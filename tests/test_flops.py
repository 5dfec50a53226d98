"""Analytic FLOPs against the paper and XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mae_jax.models.flops import forward_flops, patch_embed_flops, peak_flops, train_flops
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VARIANTS


@pytest.mark.parametrize(
    ("name", "patches", "values", "forward", "train"),
    [
        ("vit_b16", 196, 768, 19.562, 58.46),
        ("vit_l16", 196, 768, 41.512, 124.23),
        ("vit_h14", 256, 588, 97.124, 290.99),
    ],
)
def test_flops_of_the_papers_variants(name, patches, values, forward, train):
    args = (VARIANTS[name], patches, patches // 4, values)
    assert forward_flops(*args) / 1e9 == pytest.approx(forward, abs=1e-3)
    assert train_flops(*args) / 1e9 == pytest.approx(train, abs=5e-3)


@pytest.mark.parametrize(
    ("name", "patches", "train", "images", "gpu_hours"),
    [
        ("vit_h16", 256, 449.4, 8192 * 400 * 1605, 1660),
        ("vit_1b16", 256, 767.0, 8192 * 400 * 1605, 2832),
        ("vit_5b16", 256, 2534.3, 16384 * 800 * 1605, 37436),
    ],
)
def test_cost_of_pixios_recipe(name, patches, train, images, gpu_hours):
    """The numbers of docs/reproduce.md: at 40 % of an H100's peak."""
    flops = train_flops(VARIANTS[name], patches, patches // 4, 768)
    assert flops / 1e9 == pytest.approx(train, abs=0.05)
    hours = flops * images / (0.4 * peak_flops("NVIDIA H100") * 3600)
    assert hours == pytest.approx(gpu_hours, abs=1)


@pytest.mark.parametrize(("predicted", "class_tokens"), [(147, 1), (74, 1), (1, 1), (74, 8)])
def test_forward_flops_are_xlas(predicted, class_tokens):
    """For ViT-B/16, unrolled: XLA counts the body of a loop once."""
    variant, n, kept = VARIANTS["vit_b16"], 196, 49
    variant = dataclasses.replace(variant, class_tokens=class_tokens)
    model = make_mae(variant, grid=(14, 14), execution=ExecutionConfig(scan_unroll=12))
    ids = jnp.arange(n)[None]
    args = jnp.zeros((1, n, 768)), ids[:, :kept], ids[:, kept : kept + predicted]
    params = jax.eval_shape(model.init, jax.random.key(0), *args)

    def forward(model, patches, ids_keep, ids_masked):  # with the head on all tokens
        return model.decoder(model.encoder(patches, ids_keep), ids_keep, ids_masked, 0)

    predict = jax.jit(lambda params, *args: model.apply(params, *args, method=forward))
    xla = predict.lower(params, *args).cost_analysis()["flops"]
    not_embedded = patch_embed_flops(variant, n - kept, 768)  # the model embeds kept patches only
    analytic = forward_flops(variant, n, kept, 768, predicted=predicted)
    assert xla == pytest.approx(analytic - not_embedded, rel=0.03)


def test_predicting_all_masked_patches_is_the_default():
    args = VARIANTS["vit_b16"], 196, 49, 768
    assert train_flops(*args, predicted=147) == train_flops(*args)
    assert train_flops(*args, predicted=146) < train_flops(*args)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v5", 459e12),  # libtpu's name of v5p
        ("TPU v5 lite", 197e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peak_flops_by_the_names_that_drivers_report(kind, peak):
    assert peak_flops(kind) == peak
