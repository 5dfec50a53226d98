"""Outputs of transformers' PixioModel on the same weights, and files of torch.save."""

import logging

import jax
import numpy as np
import pytest
import torch
from convert_helpers import assert_same
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModel, PixioBackbone, PixioConfig, PixioModel

import mae_jax
from mae_jax.convert import weights

FILES = "pixio/checkpoints"
TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    n_cls_tokens=3,
)
VIT_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)


def random_model(kind=PixioModel, **config):
    """Return a model with noise in all parameters: many biases are initialized to zero."""
    torch.manual_seed(0)
    model = kind(PixioConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.eval()


def uint8_images(size, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def torch_outputs(model, images, info):
    mean, std = (np.array(values, np.float32) for values in (info.mean, info.std))
    pixels = (images.astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)


def check_outputs(torch_model, path, size, **options):
    """Compare the tokens, their mean before and after the norm, and those of an early block."""
    model, params = mae_jax.load(path, image_size=size, **options)
    images, count = uint8_images(size), model.info.class_tokens
    expected = torch_outputs(torch_model, images, model.info)
    run = jax.jit(lambda params, images: model.features(params, images, layers=(1,), grid=True))
    features = run(params, images)
    tokens = expected.last_hidden_state
    early = torch_model.layernorm(expected.hidden_states[1])
    for name, array in (
        ("class_tokens", tokens[:, :count]),
        ("grid", tokens[:, count:].reshape(features["grid"].shape)),
        ("cls", expected.pooler_output),
        ("global", expected.hidden_states[-1][:, :count].mean(dim=1)),
        ("class_tokens_1", early[:, :count]),
    ):
        reference = array.detach().numpy()
        error = np.abs(np.asarray(features[name]) - reference).max()
        assert error <= 1e-5 * np.abs(reference).max(), name


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (24, 40)])
def test_outputs(tmp_path, size):
    torch_model = random_model(**TINY)
    torch_model.save_pretrained(tmp_path)
    check_outputs(torch_model, tmp_path, size)


def test_outputs_of_vit_b(tmp_path):
    torch_model = random_model(**VIT_B)
    torch_model.save_pretrained(tmp_path)
    check_outputs(torch_model, tmp_path, (256, 256))


def test_export(golden, tmp_path):
    """Every parameter is loaded, and what transformers saves then has the same names."""
    encoder = weights.read(golden / FILES / "official_encoder.safetensors", heads=2)
    weights.write(encoder, tmp_path / "hf", "hf")
    torch_model, report = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(torch_model) is PixioModel
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_outputs(torch_model.eval(), tmp_path / "hf", (32, 32))
    torch_model.save_pretrained(tmp_path / "saved")
    ours, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "saved"))
    assert_same(saved, ours)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert dict(processor.crop_size) == {"height": 32, "width": 32}


def test_a_backbone(tmp_path):
    backbone = random_model(PixioBackbone, **TINY, out_indices=[2])
    backbone.save_pretrained(tmp_path)
    model, params = mae_jax.load(tmp_path)
    images = uint8_images((32, 32))
    (expected,) = torch_outputs(backbone, images, model.info).feature_maps
    grid = np.moveaxis(np.asarray(model.features(params, images, grid=True)["grid"]), -1, 1)
    assert np.abs(grid - expected.numpy()).max() <= 1e-5 * expected.abs().max()


# ---------------------------------------------------------------- files of torch.save


def test_official_encoder_round_trip(golden, tmp_path, caplog):
    """A bare state dict, as Pixio's own code loads it strictly."""
    source = golden / FILES / "official_encoder.pth"
    encoder = weights.read(source, heads=2)
    expected = weights.read(golden / FILES / "official_encoder.safetensors", heads=2)
    assert_same(encoder.arrays, expected.arrays)
    weights.write(encoder, tmp_path / "hf", "hf")
    weights.write(weights.read(tmp_path / "hf"), tmp_path / "back.pth", "pixio")
    assert "has tensors only, as pixio expects" in caplog.text
    before, after = (
        torch.load(path, weights_only=True) for path in (source, tmp_path / "back.pth")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


def test_pretraining_checkpoint(golden, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        full = weights.read(golden / FILES / "pretrain_latest.pth", heads=2, decoder_heads=2)
    assert "ignored in pretrain_latest.pth: optimizer, epoch, scaler, args" in caplog.text
    info = full.info
    assert (info.target, info.mask_ratio, info.mask_cell) == ("normalized", 0.75, 2)
    assert (info.source, info.class_tokens) == ("pixio", 2)
    weights.write(full, tmp_path / "back.pth", "pixio")
    model = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    recorded = load_file(golden / FILES / "pretrain_latest_model.safetensors")
    assert_same({name: tensor.numpy() for name, tensor in model.items()}, recorded)
    assert weights.read(tmp_path / "back.pth").info == info
