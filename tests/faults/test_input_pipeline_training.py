"""benchmarks.input_pipeline with a tiny model: it compiles and runs a train step."""

import json

from image_helpers import encoded, noise_image

from benchmarks import input_pipeline
from mae_jax.train import recipes


def test_loader_step_and_both_are_timed(tmp_path, monkeypatch):
    for number in range(24):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(noise_image(number, (30, 40)), "JPEG"))
    monkeypatch.setattr(input_pipeline, "RESIZERS", ("host",))
    config = recipes.base()
    config.batch_size = 8
    config.model.update(image_size=(16, 16), patch=8, width=8, depth=1, heads=1)
    config.model.update(decoder_width=8, decoder_depth=1, decoder_heads=1)
    config.data.update(source="folder", path=str(tmp_path))
    (row,) = input_pipeline.compare_training(config, tmp_path / "runs", steps=2, rounds=1)
    speed = row["images_per_s"]
    assert min(speed[part] for part in input_pipeline.PARTS) > 0
    assert 0 <= row["data_wait"] <= 1
    assert row["limit"] == min(("loader", "step"), key=lambda part: speed[part])
    json.dumps(row, allow_nan=False)
