"""`predict` beside transformers' pipeline, for each problem type of a classifier."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline

from mae_jax import predict
from mae_jax.convert import weights

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=8,
)


@pytest.mark.parametrize(
    ("problem_type", "count", "column"),
    [
        (None, 3, "probability"),
        ("single_label_classification", 3, "probability"),
        ("multi_label_classification", 7, "probability"),
        ("multi_label_classification", 1, "probability"),
        ("regression", 2, "value"),
        ("regression", 1, "value"),
    ],
)
def test_predict(tmp_path, problem_type, count, column):
    torch.manual_seed(0)
    names = {number: f"finding {number}" for number in range(count)}
    config = ViTConfig(**SIZES, id2label=names, problem_type=problem_type)
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.bias)
    model.save_pretrained(tmp_path / "hf")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "hf")
    pixels = np.arange(3072, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    weights.write(weights.read(tmp_path / "hf"), tmp_path / "again", "hf")
    found = pipeline("image-classification", model=str(tmp_path / "hf"))
    expected = {f["label"]: f["score"] for f in found(str(tmp_path / "x.png"), top_k=count)}
    for folder in ("hf", "again"):
        argv = [str(tmp_path / "x.png"), "--checkpoint", str(tmp_path / folder)]
        predict.main([*argv, "--out", str(tmp_path / "p.csv")])
        rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
        ours = {row["name"]: float(row[column]) for row in rows}
        assert ours == pytest.approx(expected, abs=2e-5)
    reread = ViTForImageClassification.from_pretrained(tmp_path / "again").config
    assert (reread.problem_type, reread.id2label) == (problem_type, names)
