"""benchmarks.input_pipeline on a tiny model, and its verdict."""

import json

import pytest
from image_helpers import encoded, noise_image

from benchmarks import input_pipeline, loaders
from configs import common
from mae_jax.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(loaders.BATCH):
        (folder / f"{number}.jpg").write_bytes(encoded(noise_image(number, (30, 40)), "JPEG"))
    return folder


def test_loaders_are_timed_in_subprocesses(folder, monkeypatch):
    monkeypatch.setattr(loaders, "installed_loaders", lambda: ["mae_jax (host)"])
    (row,) = loaders.compare_loaders(folder, threads=1, rounds=1, images=64)
    assert row["name"] == "mae_jax (host)"
    assert row["images_per_s"] > 0
    assert row["cpu_us"] > 0
    assert row["ratio"] is None  # without torchvision


def test_loader_step_and_both_are_timed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(input_pipeline, "RESIZERS", ("host",))
    config = common.base()
    config.batch_size = 8
    config.model.update(image_size=(16, 16), patch=8, width=8, depth=1, heads=1)
    config.model.update(decoder_width=8, decoder_depth=1, decoder_heads=1)
    config.data.update(source="folder", path=str(folder))
    (row,) = input_pipeline.compare_training(config, tmp_path, steps=2, rounds=1)
    speed = row["images_per_s"]
    assert min(speed[part] for part in input_pipeline.PARTS) > 0
    assert 0 <= row["data_wait"] <= 1
    assert row["limit"] == min(("loader", "step"), key=lambda part: speed[part])
    json.dumps(row, allow_nan=False)


def test_too_few_images_are_refused(folder, tmp_path):
    args = input_pipeline.parse(["--folder", str(folder), "--batch", "96"])
    with pytest.raises(UserError, match="64 images, fewer than a batch of 96"):
        input_pipeline.make_report(args, common.base(), tmp_path)


def test_bottleneck():
    run = lambda speed: {"images_per_s": speed, "cpu_ms": 1.0, "data_wait": 0.5}
    runs = {"loader": [run(100.0)], "step": [run(250.0)], "both": [run(90.0)]}
    row = input_pipeline.summarize(runs, "more cores")
    assert row["overlap"] == 0.9
    assert row["verdict"] == (
        "the loader is the bottleneck: the step alone is 2.5 times as fast. What helps: more cores"
    )
    runs["loader"] = [run(1000.0)]
    verdict = input_pipeline.summarize(runs, "more cores")["verdict"]
    assert verdict == "the step is the bottleneck: the loader alone is 4.0 times as fast"
