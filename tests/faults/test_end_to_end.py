"""benchmarks.end_to_end on a tiny model: it compiles two programs, and runs them."""

import json
import tempfile

from image_helpers import encoded, noise_image

from benchmarks import end_to_end
from configs import common

BATCH, FILES = 8, 24


def tiny():
    config = common.base()
    config.batch_size = BATCH
    config.model.update(image_size=(16, 24), patch=8, width=16, depth=2, heads=2)
    config.model.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.data.canvas = 96
    return config


def test_all_cases_are_measured_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    folder, temporary = tmp_path / "mine", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for number in range(FILES):
        (folder / f"{number}.jpg").write_bytes(encoded(noise_image(number, (60, 80)), "JPEG"))
    arguments = end_to_end.parse(
        ["--folder", str(folder), "--batch", str(BATCH), "--steps", "3", "--rounds", "2"]
    )
    report = end_to_end.make_report(tiny(), arguments)
    assert not list(temporary.iterdir())
    assert report["files"] == FILES
    assert list(report["first_step"]) == ["host", "device"]
    assert len({(row["source"], row["resize_on"]) for row in report["rows"]}) == 4
    for row in report["rows"]:
        speed = row["images_per_s"]
        assert 0 < row["in_turns"] < min(speed["loader"], speed["step"])
        assert min(row["overlaps"]) > 0
        assert len(row["overlaps"]) == 2
        assert min(row["overlaps"]) <= row["overlap"] <= max(row["overlaps"])
        assert 0 <= row["data_wait"] <= 1
        assert 0 <= row["data_ready"] <= 2
        assert row["limit"] == min(("loader", "step"), key=lambda turn: speed[turn])
    json.dumps(report, allow_nan=False)
    end_to_end.show(report)
    said = capsys.readouterr().out
    assert "array_record, device: the" in said
    assert "is the limit" in said
