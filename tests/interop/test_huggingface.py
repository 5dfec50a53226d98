"""transformers' ViTMAE and ViT against ours, on the same weights and the same noise."""

import logging

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
from mae_jax.convert.model_info import make_classifier, to_variables
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


def randomise(model):
    """Biases and tokens too: transformers starts many of them at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def assert_close(found, expected):
    expected = expected.detach().numpy()
    assert np.abs(np.asarray(found) - expected).max() <= 5e-5 * np.abs(expected).max()


def nhwc(pixels):
    return jnp.asarray(pixels.permute(0, 2, 3, 1).numpy())


def check_forward_pass(theirs, model, params):
    size, count = theirs.config.image_size, model.info.grid[0] * model.info.grid[1]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn((2, 3, size, size), generator=generator)
    noise = torch.rand((2, count), generator=generator)
    with torch.no_grad():
        expected = theirs(pixels, noise=noise)
    task = model.task()
    mask = masking.mask_from_noise(jnp.asarray(noise.numpy()), task.num_kept)
    patches = patchify(nhwc(pixels), model.info.patch)
    assert_close(task.apply("predict", params, patches, *mask), expected.logits)
    np.testing.assert_allclose(
        task.loss_of_patches(params, patches, mask), expected.loss.item(), rtol=1e-5
    )


@pytest.mark.parametrize("norm_pix", [False, True])
def test_theirs_to_ours(tmp_path, norm_pix):
    config = ViTMAEConfig(**TINY, **TINY_DECODER, norm_pix_loss=norm_pix)
    theirs = randomise(ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)
    model, params = mae_jax.load(tmp_path)
    assert model.info.target == ("normalized" if norm_pix else "pixels")
    check_forward_pass(theirs, model, params)


def test_vit_b(tmp_path):
    theirs = randomise(ViTMAEForPreTraining(ViTMAEConfig(layer_norm_eps=1e-6)))
    theirs.save_pretrained(tmp_path)
    model, params = mae_jax.load(tmp_path)
    assert model.info.size_name == "vit_b16"
    check_forward_pass(theirs, model, params)


def test_ours_to_theirs(golden, tmp_path, caplog):
    reading = dict(target="pixels", **HEADS)
    weights.write(weights.read(golden / OFFICIAL, **reading), tmp_path / "hf", "hf")
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.layer_norm_eps == 1e-6
    check_forward_pass(theirs.eval(), *mae_jax.load(golden / OFFICIAL, **reading))
    # And once more through their own way of writing it.
    theirs.save_pretrained(tmp_path / "theirs")
    again = weights.read(tmp_path / "theirs")
    assert_same(again.arrays, weights.read(golden / OFFICIAL, **reading).arrays)


def test_encoder_alone(golden, tmp_path):
    found = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
    weights.write(found, tmp_path / "hf", "hf")
    theirs, report = ViTMAEModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True, mask_ratio=0.0
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model, params = mae_jax.load(tmp_path / "hf")
    pixels = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    noise = torch.arange(16.0).repeat(2, 1)
    with torch.no_grad():
        expected = theirs.eval()(pixels, noise=noise).last_hidden_state
    outputs = make_classifier(model.info).apply(to_variables(params), patchify(nhwc(pixels), 8))
    assert_close(outputs.tokens, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    again = weights.read(tmp_path / "theirs")
    assert_same(again.arrays, weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS)).arrays)


def test_image_classification_both_ways(tmp_path):
    names = {0: "cat", 1: "dog", 2: "eel"}
    theirs = randomise(ViTForImageClassification(ViTConfig(**TINY, id2label=names)))
    theirs.save_pretrained(tmp_path / "theirs")
    weights.write(weights.read(tmp_path / "theirs"), tmp_path / "ours.safetensors", "mae_jax")
    model, params = mae_jax.load(tmp_path / "ours.safetensors")
    assert model.info.class_names == ("cat", "dog", "eel")
    pixels = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(pixels).logits
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


def test_their_default_epsilon_is_kept(tmp_path, caplog):
    config = ViTMAEConfig(**{**TINY, "layer_norm_eps": 1e-12}, **TINY_DECODER)
    randomise(ViTMAEForPreTraining(config)).save_pretrained(tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        weights.write(weights.read(tmp_path / "hf"), tmp_path / "o.pth", "official")
    assert "layer_norm_eps=1e-12, which official cannot hold" in caplog.text
    assert weights.read(tmp_path / "o.pth").info.layer_norm_eps == 1e-12
