"""Outputs of transformers' ViTMAE and ViT on the same weights and the same noise."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from convert_helpers import HEADS, OFFICIAL, assert_same
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

import mae_jax
from mae_jax.convert import weights
from mae_jax.convert.networks import make_classifier, to_variables
from mae_jax.models.patches import patchify
from mae_jax.tasks import masking

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    image_size=32,
    patch_size=8,
    layer_norm_eps=1e-6,
)
TINY_DECODER = dict(
    decoder_hidden_size=48,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=96,
)


def randomize(model):
    """Add noise to all parameters: transformers initializes many biases and tokens to zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def assert_close(array, expected):
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(array) - expected).max() <= 5e-5 * np.abs(expected).max()


def nhwc(pixels):
    return jnp.asarray(pixels.permute(0, 2, 3, 1).numpy())


def check_forward_pass(torch_model, model, params):
    size, count = torch_model.config.image_size, model.info.grid[0] * model.info.grid[1]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn((2, 3, size, size), generator=generator)
    noise = torch.rand((2, count), generator=generator)
    with torch.no_grad():
        expected = torch_model(pixels, noise=noise)
    task = model.task()
    mask = masking.mask_from_noise(jnp.asarray(noise.numpy()), task.num_kept)
    patches = patchify(nhwc(pixels), model.info.patch)

    @jax.jit
    def run(params, patches, mask):
        logits = task.apply("predict", params, patches, *mask)
        return logits, task.loss_of_patches(params, patches, mask)

    logits, loss = run(params, patches, mask)
    assert_close(logits, expected.logits)
    np.testing.assert_allclose(loss, expected.loss.item(), rtol=1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_import(tmp_path, norm_pix):
    config = ViTMAEConfig(**TINY, **TINY_DECODER, norm_pix_loss=norm_pix)
    torch_model = randomize(ViTMAEForPreTraining(config))
    torch_model.save_pretrained(tmp_path)
    model, params = mae_jax.load(tmp_path)
    assert model.info.target == ("normalized" if norm_pix else "pixels")
    check_forward_pass(torch_model, model, params)


def test_import_of_vit_b(tmp_path):
    torch_model = randomize(ViTMAEForPreTraining(ViTMAEConfig(layer_norm_eps=1e-6)))
    torch_model.save_pretrained(tmp_path)
    model, params = mae_jax.load(tmp_path)
    assert model.info.size_name == "vit_b16"
    check_forward_pass(torch_model, model, params)


def test_export(golden, tmp_path):
    overrides = dict(target="pixels", **HEADS)
    weights.write(weights.read(golden / OFFICIAL, **overrides), tmp_path / "hf", "hf")
    torch_model, report = ViTMAEForPreTraining.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch_model.config.layer_norm_eps == 1e-6
    check_forward_pass(torch_model.eval(), *mae_jax.load(golden / OFFICIAL, **overrides))
    # Read what transformers writes, too.
    torch_model.save_pretrained(tmp_path / "saved")
    reread = weights.read(tmp_path / "saved")
    assert_same(reread.arrays, weights.read(golden / OFFICIAL, **overrides).arrays)


def test_export_of_an_encoder(golden, tmp_path):
    encoder = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    weights.write(encoder, tmp_path / "hf", "hf")
    torch_model, report = ViTMAEModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True, mask_ratio=0.0
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model, params = mae_jax.load(tmp_path / "hf")
    pixels = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    noise = torch.arange(16.0).repeat(2, 1)
    with torch.no_grad():
        expected = torch_model.eval()(pixels, noise=noise).last_hidden_state
    outputs = make_classifier(model.info).apply(to_variables(params), patchify(nhwc(pixels), 8))
    assert_close(outputs.tokens, expected)
    torch_model.save_pretrained(tmp_path / "saved")
    reread = weights.read(tmp_path / "saved")
    assert_same(reread.arrays, encoder.arrays)


def test_round_trip_of_a_classifier(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    torch_model = randomize(ViTForImageClassification(ViTConfig(**TINY, id2label=names)))
    torch_model.save_pretrained(tmp_path / "saved")
    weights.write(weights.read(tmp_path / "saved"), tmp_path / "ours.safetensors", "mae_jax")
    model, params = mae_jax.load(tmp_path / "ours.safetensors")
    assert model.info.class_names == ("cat", "dog", "eel")
    pixels = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch_model(pixels).logits
    outputs = make_classifier(model.info).apply(to_variables(params), patchify(nhwc(pixels), 8))
    assert_close(outputs.logits, expected)

    weights.write(weights.read(tmp_path / "ours.safetensors"), tmp_path / "back", "hf")
    back, report = ViTForImageClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert back.config.id2label == names
    with torch.no_grad():
        assert torch.equal(back.eval()(pixels).logits, expected)


def test_default_epsilon_of_transformers_is_kept(tmp_path, caplog):
    config = ViTMAEConfig(**{**TINY, "layer_norm_eps": 1e-12}, **TINY_DECODER)
    randomize(ViTMAEForPreTraining(config)).save_pretrained(tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(tmp_path / "hf"), tmp_path / "o.pth", "official")
    assert "layer_norm_eps=1e-12, which official cannot store" in caplog.text
    assert weights.read(tmp_path / "o.pth").info.layer_norm_eps == 1e-12
