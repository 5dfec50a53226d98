"""Exported ONNX files: onnxruntime computes what the model computes."""

import json

import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from convert_helpers import random_weights

import mae_jax
from mae_jax.convert import export, weights
from mae_jax.tasks.masking import mask_from_noise

DECODER = dict(decoder_width=16, decoder_depth=1, decoder_heads=2, target="normalized")
pytestmark = pytest.mark.filterwarnings("default")  # those of jax2onnx and onnx are theirs


@pytest.fixture
def exported(tmp_path):
    """Return a model, its parameters and the session of its exported file, by metadata."""

    def make(output, **info):
        checkpoint, file = tmp_path / "model.safetensors", tmp_path / "model.onnx"
        weights.write(random_weights(**info), checkpoint, "mae_jax")
        export.main([str(checkpoint), str(file), "--output", output])
        return *mae_jax.load(checkpoint), onnxruntime.InferenceSession(file)

    return make


def run(session, *inputs):
    names = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    return dict(zip(outputs, session.run(None, dict(zip(names, inputs)))))


def images_of(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-4, err_msg=name)


def test_features(exported):
    model, params, session = exported("features", **DECODER)
    for count in (1, 3):
        images = images_of(count)
        expected = model.features(params, images, grid=True)
        assert_close(run(session, images), expected)


def test_the_network_is_computed_once_for_all_outputs(tmp_path):
    weights.write(random_weights(), tmp_path / "model.safetensors", "mae_jax")
    program = export.make_program(*mae_jax.load(tmp_path / "model.safetensors"))
    graph = onnx.load_from_string(export.to_onnx(program)).graph
    assert [node.op_type for node in graph.node].count("Loop") == 1, "over the blocks"


@pytest.mark.parametrize(
    "info",
    [
        dict(pool="mean", fc_norm=True),
        dict(pool="attention", head_norm=True),
        dict(pool="grid"),
        dict(pool="grid", upsample_width=4),
    ],
    ids=["finetuned", "attentive probe", "linear segmentation", "upsampling segmentation"],
)
def test_logits(exported, info):
    names = tuple("abcde")
    model, params, session = exported("logits", num_classes=5, class_names=names, **info)
    for count in (1, 2):
        images = images_of(count)
        assert_close(run(session, images), {"logits": model.logits(params, images)})
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(names)
    assert json.loads(metadata["outputs"])["logits"]["shape"][0] == "b"
    assert json.loads(metadata["versions"]).keys() == {"mae_jax", "jax", "jax2onnx"}
    assert metadata["output"] == "logits"


def test_reconstruction(exported):
    model, params, session = exported("reconstruction", **DECODER)
    images = images_of(2)
    noise = np.random.default_rng(1).random((2, 16), np.float32)
    task = model.task()
    mask = mask_from_noise(jnp.asarray(noise), task.num_kept)
    expected = task.reconstruct(params, jnp.asarray(images), mask, "visible")
    actual = run(session, images, noise)["reconstruction"]
    assert actual.dtype == np.uint8
    assert np.abs(actual.astype(int) - expected).max() <= 1, "gray level: rounding"
