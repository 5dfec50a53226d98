"""python -m mae_jax.evaluate: results, batch sizes, errors; probes and scores."""

import contextlib
import io
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax.data.sources import DataError
from mae_jax.distributed.inference import EvalBatches
from mae_jax.distributed.sharding import make_mesh, state_shardings
from mae_jax.evaluate import __main__
from mae_jax.evaluate.metrics import Score, accuracy
from mae_jax.evaluate.probe import ProbeRecipe, batch_size_for, probe_scores
from mae_jax.train.evaluators import FeatureEvaluator
from mae_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of colors with noise; 37 evaluation images fill no batch."""
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


def run(checkpoint, images, out, *flags):
    arguments = ["--checkpoint", checkpoint, "--data", str(images), "--num-heads", "2"]
    __main__.main([*arguments, "--out", str(out), *flags])
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def full_report(checkpoint, images, tmp_path_factory):
    """The results of all measures but "head", and the table on stdout."""
    out = tmp_path_factory.mktemp("report") / "all.json"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        report = run(checkpoint, images, out, "--suite", "knn,linear,attentive,layers,few_shot")
    return report, stdout.getvalue()


def test_all_measures(full_report):
    report, table = full_report
    rows = {(row["measure"], row["features"]): row for row in report["results"]}
    assert {row["images"] for row in report["results"]} == {37} == {report["eval_images"]}
    assert (report["train_images"], report["classes"]) == (61, 3)
    layers = {name for measure, name in rows if measure == "linear probe" and "_" in name}
    assert layers == {"cls_1", "cls_2", "mean_1", "mean_2"}
    assert rows["linear probe", "mean"]["top1"] == 1.0, "the colors are easy to separate"
    assert rows["k-NN, k = 5", "mean"]["top1"] == 1.0
    assert rows["attentive probe", "patches"]["top1"] > 0.5
    assert rows["linear, 10-shot", "mean"]["spread"] >= 0
    for row in rows.values():
        low, high = row["interval"]
        assert 0 <= low <= row["top1"] <= high <= 1.0 + 1e-9
        assert row["top5"] == 1.0, "there are only three classes"
    # The features of the last layer with the final norm are those of the encoder.
    assert rows["linear probe", "cls_2"]["top1"] == rows["linear probe", "cls"]["top1"]
    assert "best layer" in table
    assert max(map(len, table.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("batch_size", [1, 64])
def test_results_do_not_depend_on_the_batch_size(
    checkpoint, images, full_report, tmp_path, batch_size
):
    assert jax.device_count() == 4
    flags = ["--suite", "knn", "--batch-size", str(batch_size)]
    results = run(checkpoint, images, tmp_path / "a.json", *flags)["results"]
    expected = [row for row in full_report[0]["results"] if row["measure"].startswith("k-NN")]
    for row, other in zip(results, expected, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


def test_the_head_of_a_checkpoint(golden, images, tmp_path):
    with_head = str(golden / "vit" / "v0_cls" / "state_dict.safetensors")
    with pytest.raises(UserError, match="has 10 classes, the dataset 3"):
        run(with_head, images, tmp_path / "a.json", "--suite", "head")
    ten_classes = tmp_path / "ten"
    for split in ("train", "validation"):
        for label in range(10):
            folder = ten_classes / split / str(label)
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label,) * 3).save(folder / "a.png")
    report = run(with_head, ten_classes, tmp_path / "b.json", "--suite", "head")
    (row,) = report["results"]
    assert row["images"] == 10
    assert 0 < row["top1"] <= 0.2, "it is untrained, but predicts some class"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "probe"], "there is no 'probe'; use some of knn, linear"),
        (["--suite", "head"], "has no classification head"),
        (["--suite", "few_shot", "--shots", "50"], "is more than the 20 images of class"),
        (["--eval-split", "val"], "val does not exist"),
        (["--max-gb", "0.00001"], "allow them with --max-gb"),
        (["--out", "results.txt"], "must end in .json"),
    ],
    ids=str,
)
def test_invalid_arguments(checkpoint, images, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(checkpoint, images, tmp_path / "a.json", *flags)
    assert not (tmp_path / "a.json").exists()


def test_data_without_labels_and_unknown_data(checkpoint, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a.png")
    with pytest.raises(DataError, match="has no class labels"):
        run(checkpoint, tmp_path, tmp_path / "a.json")
    with pytest.raises(DataError, match="'nowhere/at_all'"):
        run(checkpoint, "nowhere/at_all", tmp_path / "a.json")


def test_probes_trained_together_equal_probes_trained_alone():
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 4, 200), rng.integers(0, 4, 50)
    centers = rng.normal(size=(2, 4, 6))
    sample = lambda c, y: (c[y] + rng.normal(size=(len(y), 6)) * 0.7).astype(np.float32)
    train = {name: sample(c, labels) for name, c in zip("ab", centers)}
    test = {name: sample(c, test_labels) for name, c in zip("ab", centers)}
    train["noise"], test["noise"] = (
        rng.normal(size=(count, 6)).astype(np.float32) for count in (200, 50)
    )
    options = dict(num_classes=4, recipe=ProbeRecipe(epochs=20.0))
    together = probe_scores(train, labels, test, test_labels, **options)
    assert together["noise"].top1 < 0.5
    for name in "ab":
        alone = probe_scores(
            {name: train[name]}, labels, {name: test[name]}, test_labels, **options
        )
        assert alone[name] == together[name]
        assert alone[name].top1 > 0.6


def test_batch_size_of_probes_is_the_papers_for_imagenet():
    assert batch_size_for(1_281_167) == 16384
    assert batch_size_for(7600) == 237
    assert batch_size_for(61) == 8
    assert batch_size_for(5) == 5


def test_accuracy_and_wilson_interval():
    ranking = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [1, 0, 2, 3, 4, 5]])
    score = accuracy(ranking, np.array([0, 0, 0]))
    assert score == Score(1 / 3, 2 / 3, 3)
    # 8 of 10, from a table of Wilson intervals.
    np.testing.assert_allclose(Score(0.8, 1.0, 10).interval, (0.4902, 0.9433), atol=1e-4)
    assert Score(0.0, 0.0, 5).interval[0] == pytest.approx(0.0)


class RandomProjection:
    """A task whose encoder is a matrix."""

    nodata = False

    def init(self, key):
        return {"w": jax.random.normal(key, (4, 3))}

    def features(self, params, images):
        return images.reshape(len(images), -1).astype("float32") @ params["w"]


def test_runs_evaluate_baselines_at_the_end(monkeypatch, caplog):
    rng = np.random.default_rng(0)

    def batches(count):
        label = rng.integers(0, 3, count)
        image = rng.integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)
        batch = {"image": image, "label": label, "valid": np.ones(count, bool)}
        return EvalBatches(count, lambda: [batch])

    probed = lambda train, *_, **__: {name: Score(len(name) / 20, 1.0, 40) for name in train}
    monkeypatch.setattr("mae_jax.evaluate.suite.probe_scores", probed)
    key, task, heartbeats = jax.random.key(1), RandomProjection(), []
    evaluator = FeatureEvaluator(
        task,
        bank=batches(200),
        queries=batches(120),
        num_classes=3,
        ks=(3, 5),
        temperature=0.07,
        mesh=make_mesh(),
        every=1,
        linear=True,
        baseline_key=key,
        heartbeat=heartbeats.append,
    )

    def state(index):
        params = task.init(jax.random.fold_in(key, index))
        shardings = state_shardings(params, evaluator.mesh)
        return SimpleNamespace(params=jax.device_put(params, shardings))

    encoder, random = [evaluator.run(0, state(index))["knn_top1"] for index in range(2)]
    assert encoder != random
    heartbeats.clear()
    caplog.set_level("INFO")
    results = evaluator.finish(0, state(0))
    kinds = ("", "_random_init", "_pixels")
    measures = ("knn_top1", "knn_top1_k5", "linear_top1")
    assert set(results) == {measure + kind for measure in measures for kind in kinds}
    assert results["knn_top1"] == encoder
    assert results["knn_top1_random_init"] == random
    assert results["linear_top1_pixels"] == len("pixels") / 20
    assert heartbeats[0] == "features of 200 training images"
    assert [f"evaluating: {text}" for text in heartbeats] == caplog.messages
