"""What benchmarks.end_to_end reads, what it refuses, and its words for what limits a run."""

import tempfile

import pytest
from image_helpers import encoded, noise_image

from benchmarks import end_to_end
from mae_jax.data.factory import open_source

BATCH, FILES = 8, 24


@pytest.fixture
def folder(tmp_path):
    """JPEGs, one that is none, and a picture of another kind."""
    found = tmp_path / "mine"
    found.mkdir()
    for number in range(FILES):
        (found / f"{number}.JPEG").write_bytes(encoded(noise_image(number, (60, 80)), "JPEG"))
    (found / "other.png").write_bytes(encoded(noise_image(0)))
    (found / "web.jpg").write_text("<html>")
    return found


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where all temporary files go."""
    found = tmp_path / "temporary"
    found.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found))
    return found


def test_both_data_sets_hold_the_same_files(folder, tmp_path):
    (tmp_path / "sets").mkdir()
    folders = end_to_end.make_data_sets(tmp_path / "sets", folder, 99, BATCH)
    sources = [
        open_source("folder", None, str(folders["folder"]), "train"),
        open_source("tfds", "images", str(folders["array_record"]), "train"),
    ]
    held = [sorted(source[number]["image"] for number in range(FILES)) for source in sources]
    assert held[0] == held[1]
    assert [len(source) for source in sources] == [FILES, FILES]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ("*.png", "no JPEGs in"),
        ("nothing", "no images in"),
        ("1*", "--batch 64 is larger than the 11 good JPEGs"),
        ("web*", "--batch 64 is larger than the 0 good JPEGs"),
    ],
)
def test_too_few_images_end_with_a_sentence(folder, temporary, capsys, kept, message):
    for path in set(folder.iterdir()) - set(folder.glob(kept)):
        path.unlink()
    with pytest.raises(SystemExit) as error:
        end_to_end.main(["--folder", str(folder)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(temporary.iterdir())


def test_the_verdict_says_what_helps():
    row = {"images_per_s": {"loader": 100.0, "step": 250.0}, "cpu_ms": {"loader": 3.0, "step": 1.0}}
    said = end_to_end.verdict(row | {"limit": "loader", "overlap": 1.0}, "more cores")
    assert said.startswith("the loader is the limit: the step alone is 2.5 times as fast")
    assert "What helps: more cores" in said
    assert "reading takes 75% of what they spend" in said
    row["images_per_s"]["loader"] = 1000.0
    said = end_to_end.verdict(row | {"limit": "step", "overlap": 1.0}, "more cores")
    assert said.startswith("the step is the limit: the loader alone is 4.0 times as fast")
    assert "more cores" not in said
