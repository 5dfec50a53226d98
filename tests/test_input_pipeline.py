"""benchmarks.input_pipeline: timing of loaders, and its verdict."""

import pytest
from image_helpers import encoded, noise_image

from benchmarks import input_pipeline, loaders
from mae_jax.train import recipes
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


def test_too_few_images_are_refused(folder, tmp_path):
    args = input_pipeline.parse(["--folder", str(folder), "--batch", "96"])
    with pytest.raises(UserError, match="64 images, fewer than a batch of 96"):
        input_pipeline.make_report(args, recipes.base(), tmp_path)


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
