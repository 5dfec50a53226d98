"""Exported .pth files have the tensors that detection and segmentation codes read.

The names and shapes are those of ViT backbones in detectron2 (modeling/backbone/vit.py),
mmdetection (projects/ViTDet), mmsegmentation (models/backbones/mae.py) and segment-anything
(modeling/image_encoder.py).
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mae_jax.convert import __main__ as command
from mae_jax.distributed.checkpointer import Checkpointer
from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain

WIDTH, DEPTH, HIDDEN, PATCH = 24, 2, 96, 16
FAQ = Path(__file__).parents[2] / "docs" / "faq.md"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a run of a tiny ViT/16 on images of 224 x 224."""
    workdir = tmp_path_factory.mktemp("run")
    variant = VitVariant(WIDTH, DEPTH, 2, PATCH, 16, 1, 2)
    stats = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    mae = make_mae(variant, grid=(14, 14))
    task = Pretrain(model=mae, grid=(14, 14), patch=PATCH, **stats)
    params = jax.tree.map(np.asarray, jax.jit(task.init)(jax.random.key(0)))
    model = dict(image_size=(224, 224), channels=3, layer_norm_eps=1e-6, position="sincos")
    config = {
        "task": "pretrain",
        "model": model | dataclasses.asdict(variant),
        "data": stats | {"eval_crop": 1.0},
    }
    config |= {
        "target": dict(norm_pix=True, norm_pix_eps=1e-6),
        "mask": {"kind": "random", "ratio": 0.75},
    }
    checkpointer = Checkpointer(workdir / "checkpoints", max_to_keep=1)
    state = {"params": params, "step": jnp.int32(1), "opt_state": ()}
    checkpointer.save(1, state, {"config": config, "data_fingerprint": ""})
    checkpointer.close()
    return workdir


def exported(pretrained, path, *flags):
    """Return the tensors of `convert --to official`."""
    command.main([str(pretrained), str(path), "--to", "official", *flags])
    return torch.load(path, weights_only=True)["model"]


def block_shapes(prefix, norm, fc1, fc2):
    """Return the shapes of a block of a plain ViT, with the names of a code."""
    return {
        f"{prefix}.{name}": shape
        for name, shape in {
            **{f"{norm}{i}.{kind}": (WIDTH,) for i in (1, 2) for kind in ("weight", "bias")},
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            f"{fc1}.weight": (HIDDEN, WIDTH),
            f"{fc1}.bias": (HIDDEN,),
            f"{fc2}.weight": (WIDTH, HIDDEN),
            f"{fc2}.bias": (WIDTH,),
        }.items()
    }


def backbone_shapes(blocks, patch_embed, names, pos_embed):
    """Return the shapes of a backbone, without the tensors that are new in it."""
    shapes = {"pos_embed": pos_embed}
    shapes |= {f"{patch_embed}.weight": (WIDTH, 3, PATCH, PATCH), f"{patch_embed}.bias": (WIDTH,)}
    for i in range(DEPTH):
        shapes |= block_shapes(f"{blocks}.{i}", *names)
    return shapes


VITDET = backbone_shapes(
    "blocks", "patch_embed.proj", ("norm", "mlp.fc1", "mlp.fc2"), (1, 197, WIDTH)
)
MMSEG = backbone_shapes(
    "layers",
    "patch_embed.projection",
    ("ln", "ffn.layers.0.0", "ffn.layers.1"),
    (1, 1 + 32 * 32, WIDTH),
) | {"cls_token": (1, 1, WIDTH)}
SAM = backbone_shapes(
    "blocks", "patch_embed.proj", ("norm", "mlp.lin1", "mlp.lin2"), (1, 64, 64, WIDTH)
)


def assert_shapes(tensors, expected):
    assert {name: tuple(tensors[name].shape) for name in expected if name in tensors} == expected


def test_detectron2_and_mmdetection(pretrained, tmp_path):
    tensors = exported(pretrained, tmp_path / "vit.pth")
    assert_shapes(tensors, VITDET)  # mmdetection reads these from under "model"
    for name in VITDET:  # detectron2 takes the longest name that ends the name in its model
        in_model = f"backbone.net.{name}"
        matches = [other for other in tensors if in_model.endswith(f".{other}")]
        assert max(matches, key=len) == name


def test_mmsegmentation(pretrained, tmp_path):
    tensors = exported(pretrained, tmp_path / "vit.pth", "--image-size", "512,512")
    renamed = {}  # as its tools/model_converters/beit2mmseg.py does
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            name = name.replace("blocks", "layers").replace("norm", "ln")
            name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        renamed[name.replace("patch_embed.proj.", "patch_embed.projection.")] = tensor
    assert_shapes(renamed, MMSEG)


def test_segment_anything(pretrained, tmp_path, monkeypatch):
    exported(pretrained, tmp_path / "vit_1024.pth", "--image-size", "1024,1024")
    section = FAQ.read_text().split("segment-anything\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    exec(code[1].split("sam.image_encoder")[0], variables)
    assert {name: tuple(x.shape) for name, x in variables["encoder"].items()} == SAM
    tensors = torch.load("vit_1024.pth", weights_only=True)["model"]
    position = 1 + 3 * 64 + 5  # after the cls token: row 3, column 5
    assert torch.equal(
        variables["encoder"]["pos_embed"][0, 3, 5], tensors["pos_embed"][0, position]
    )
