"""Patches with a height and a width: torch models with the same weights, images and noise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from convert_helpers import random_weights
from safetensors.torch import save_file
from test_huggingface import TINY, TINY_DECODER, assert_close, nhwc, randomize
from test_timm import run_timm
from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

import mae_jax
from mae_jax.convert import export, weights
from mae_jax.convert.hf_timm import timm_model_args
from mae_jax.convert.networks import make_classifier, to_variables
from mae_jax.models.patches import patchify
from mae_jax.tasks.masking import mask_from_noise

PATCH, SIZE = (4, 16), (16, 64)
WIDE = dict(patch=PATCH, image_size=(16, 96), width=32)  # a grid of 4 x 6


def random_pixels(height, width):
    return torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(1))


class Twin(ViTMAEForPreTraining):
    """An MAE of transformers on patches of 4 x 16 pixels.

    Its decoder sees the number of patches and of their values only, which are those of 8 x 8.
    """

    def __init__(self):
        super().__init__(ViTMAEConfig(**TINY, **TINY_DECODER, norm_pix_loss=True))
        sizes = dict(image_size=SIZE, patch_size=PATCH)
        self.vit = ViTMAEModel(ViTMAEConfig(**TINY | sizes))

    def patchify(self, pixel_values, **_):
        cut = torch.nn.functional.unfold(pixel_values, PATCH, stride=PATCH)  # channels first
        batch, values, count = cut.shape
        return cut.reshape(batch, 3, values // 3, count).permute(0, 3, 2, 1).flatten(2)


def test_pretraining_loss_and_gradients(tmp_path):
    twin, pixels = randomize(Twin()), random_pixels(*SIZE)
    noise = torch.rand((2, 16), generator=torch.Generator().manual_seed(2))
    tensors = {name: tensor.contiguous() for name, tensor in twin.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = twin.config.to_dict() | dict(image_size=SIZE, patch_size=PATCH)
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = twin(pixels, noise=noise)
    expected.loss.backward()

    model, params = mae_jax.load(tmp_path)
    assert model.info.patch == PATCH
    task = model.task()
    mask = mask_from_noise(jnp.asarray(noise.numpy()), task.num_kept)
    patches = patchify(nhwc(pixels), PATCH)
    assert_close(
        jax.jit(task.apply, static_argnums=0)("predict", params, patches, *mask), expected.logits
    )
    loss = jax.jit(jax.value_and_grad(task.loss_of_patches))
    value, gradients = loss(params, patches, mask)
    np.testing.assert_allclose(value, expected.loss.item(), rtol=1e-5)
    kernel = twin.vit.embeddings.patch_embeddings.projection.weight.grad.permute(2, 3, 1, 0)
    assert_close(gradients["encoder"]["patch_embed"]["kernel"], kernel.flatten(0, 2))
    head = twin.decoder.decoder_pred.weight.grad.T
    assert_close(gradients["decoder"]["head"]["kernel"], head)


def test_timm(tmp_path):
    checkpoint, pixels = random_weights(**WIDE), random_pixels(16, 96)
    weights.write(checkpoint, tmp_path / "timm", "timm")
    model, params = mae_jax.load(tmp_path / "timm")
    outputs = jax.jit(make_classifier(model.info).apply)(
        to_variables(params), patchify(nhwc(pixels), PATCH)
    )
    file = tmp_path / "timm" / "model.safetensors"
    arguments = timm_model_args(checkpoint.info)
    name = "vit_base_patch16_224.mae"
    for each in ((name, arguments, file), (f"local-dir:{tmp_path / 'timm'}", {}, "none")):
        expected = run_timm(tmp_path, *each, pixels.numpy())
        assert_close(outputs.tokens, torch.from_numpy(expected["tokens"]))
        assert expected["grids"].shape[-2:] == model.info.grid


def test_classifier_of_transformers(tmp_path):
    weights.write(random_weights(**WIDE, num_classes=3), tmp_path / "hf", "hf")
    twin, report = ViTForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = random_pixels(16, 96)
    model, params = mae_jax.load(tmp_path / "hf")
    network = jax.jit(make_classifier(model.info).apply)
    outputs = network(to_variables(params), patchify(nhwc(pixels), PATCH))
    assert_close(outputs.logits, twin.eval()(pixels).logits)
    twin.save_pretrained(tmp_path / "saved")
    assert weights.read(tmp_path / "saved").info.patch == PATCH


@pytest.mark.filterwarnings("default")  # those of jax2onnx and onnx are theirs
def test_onnx(tmp_path):
    weights.write(random_weights(**WIDE), tmp_path / "model.safetensors", "mae_jax")
    export.main([str(tmp_path / "model.safetensors"), str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 96, 3), dtype=np.uint8)
    model, params = mae_jax.load(tmp_path / "model.safetensors")
    expected = model.features(params, images, grid=True)
    names = [each.name for each in session.get_outputs()]
    for name, array in zip(names, session.run(None, {"images": images}), strict=True):
        np.testing.assert_allclose(array, expected[name], atol=1e-4, err_msg=name)
