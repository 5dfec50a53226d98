"""python -m mae_jax.evaluate: numbers, exactness over the whole set, and refusals."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import DataError
from mae_jax.evaluate import __main__
from mae_jax.evaluate.metrics import Score, accuracy
from mae_jax.evaluate.probe import ProbeRecipe, batch_size_for, probe_scores


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of plain colours under noise; 37 images to judge on divide by nothing."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (21, 20, 20)), ("validation", (13, 12, 12))):
        for label, count in enumerate(counts):
            (folder / split / f"class_{label}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (36, 40, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / split / f"class_{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(golden):
    return str(golden / "mae" / "p0_plain" / "state_dict.safetensors")


def run(checkpoint, images, out, *more):
    arguments = ["--checkpoint", checkpoint, "--data", str(images), "--num-heads", "2"]
    __main__.main([*arguments, "--out", str(out), *more])
    return json.loads(out.read_text())


def test_every_suite(checkpoint, images, tmp_path, capsys):
    suite = "knn,linear,attentive,layers,few_shot"
    report = run(checkpoint, images, tmp_path / "a.json", "--suite", suite)
    rows = {(row["measure"], row["features"]): row for row in report["results"]}
    assert {row["images"] for row in report["results"]} == {37} == {report["eval_images"]}
    assert (report["train_images"], report["classes"]) == (61, 3)
    layers = {name for measure, name in rows if measure == "linear probe" and "_" in name}
    assert layers == {"cls_1", "cls_2", "mean_1", "mean_2"}
    assert rows["linear probe", "mean"]["top1"] == 1.0, "colours are easily told"
    assert rows["k-NN, k = 5", "mean"]["top1"] == 1.0
    assert rows["attentive probe", "patches"]["top1"] > 0.5
    assert rows["linear, 10-shot", "mean"]["spread"] >= 0
    for row in rows.values():
        low, high = row["interval"]
        assert 0 <= low <= row["top1"] <= high <= 1.0 + 1e-9
        assert row["top5"] == 1.0, "there are but three classes"
    # The last layer with the final norm is what the probe of the encoder sees.
    assert rows["linear probe", "cls_2"]["top1"] == rows["linear probe", "cls"]["top1"]
    table = capsys.readouterr().out
    assert "best layer" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_no_batch_or_device_count_changes_the_numbers(checkpoint, images, tmp_path, batch_size):
    assert jax.device_count() == 4
    more = ["--suite", "knn", "--batch-size"]
    usual = run(checkpoint, images, tmp_path / "a.json", *more, "37")["results"]
    found = run(checkpoint, images, tmp_path / "b.json", *more, str(batch_size))["results"]
    for one, other in zip(usual, found, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_head_of_its_own(golden, images, tmp_path):
    with_head = str(golden / "vit" / "v0_cls" / "state_dict.safetensors")
    with pytest.raises(ConvertError, match="has 10 classes, the data set 3"):
        run(with_head, images, tmp_path / "a.json", "--suite", "head")
    ten = tmp_path / "ten"
    for split in ("train", "validation"):
        for label in range(10):
            (ten / split / str(label)).mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label,) * 3).save(ten / split / str(label) / "a.png")
    report = run(with_head, ten, tmp_path / "b.json", "--suite", "head")
    (row,) = report["results"]
    assert row["images"] == 10
    assert 0 < row["top1"] <= 0.2, "it was never trained, but names some class of ten"


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--suite", "probe"], ConvertError, "there is no 'probe'; use some of knn, linear"),
        (["--suite", "head"], ConvertError, "has no classification head"),
        (["--suite", "few_shot", "--shots", "50"], DataError, "has only 20 images"),
        (["--eval-split", "val"], DataError, "val does not exist"),
        (["--max-gb", "0.00001"], ConvertError, "allow them with --max-gb"),
        (["--out", "results.txt"], ConvertError, "must end in .json"),
    ],
    ids=str,
)
def test_refusals(checkpoint, images, tmp_path, more, error, message):
    with pytest.raises(error, match=message):
        run(checkpoint, images, tmp_path / "a.json", *more)
    assert not (tmp_path / "a.json").exists()


def test_data_without_labels_or_with_others(checkpoint, images, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    for split in ("train", "validation"):
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a.png")
    with pytest.raises(DataError, match="has no class labels"):
        run(checkpoint, tmp_path, tmp_path / "a.json")
    with pytest.raises(DataError, match="no data set called 'nowhere/at_all'"):
        run(checkpoint, "nowhere/at_all", tmp_path / "a.json")


def test_probes_are_trained_together_as_they_would_be_alone():
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 4, 200), rng.integers(0, 4, 50)
    centres = rng.normal(size=(2, 4, 6))
    make = lambda c, y: (c[y] + rng.normal(size=(len(y), 6)) * 0.7).astype(np.float32)
    train = {name: make(c, labels) for name, c in zip("ab", centres)}
    test = {name: make(c, test_labels) for name, c in zip("ab", centres)}
    sets = dict(num_classes=4, recipe=ProbeRecipe(epochs=20.0))
    together = probe_scores(train, labels, test, test_labels, **sets)
    for name in "ab":
        alone = probe_scores({name: train[name]}, labels, {name: test[name]}, test_labels, **sets)
        assert alone[name] == together[name]
        assert alone[name].top1 > 0.6
    noise = {"noise": rng.normal(size=(200, 6)).astype(np.float32)}
    other = {"noise": rng.normal(size=(50, 6)).astype(np.float32)}
    assert probe_scores(noise, labels, other, test_labels, **sets)["noise"].top1 < 0.5


def test_the_batch_is_the_papers_at_the_papers_size():
    assert batch_size_for(1_281_167) == 16384
    assert batch_size_for(7600) == 237
    assert batch_size_for(61) == 8
    assert batch_size_for(5) == 5


def test_scores():
    ranking = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 2, 3, 4, 5]])
    score = accuracy(ranking, np.array([0, 0, 0]))
    assert score == Score(1 / 3, 2 / 3, 3)
    # Wilson's interval of 8 in 10, as in any table of it.
    np.testing.assert_allclose(Score(0.8, 1.0, 10).interval, (0.4902, 0.9433), atol=1e-4)
    assert Score(0.0, 0.0, 5).interval[0] == pytest.approx(0.0)
