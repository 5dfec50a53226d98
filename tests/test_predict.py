"""Predictions of each problem type, and class names, in config.json of Hugging Face.

tests/interop compares them with transformers' pipeline.
"""

import csv
import dataclasses
import json

import numpy as np
import pytest
from convert_helpers import HEADS, OFFICIAL
from PIL import Image

import mae_jax
from mae_jax import predict
from mae_jax.convert import weights
from mae_jax.convert.hf_timm import parse_hf_config
from mae_jax.convert.model_info import ConvertError
from mae_jax.evaluate.__main__ import _check_head
from mae_jax.train.warm_start import check_head

MULTI = "multi_label_classification"


@pytest.fixture
def classifier(golden):
    """Return weights with a head over the cls token, by number of classes and metadata."""

    def make(count, **info):
        encoder = weights.encoder_only(weights.read(golden / OFFICIAL, **HEADS))
        rng = np.random.default_rng(0)
        head = {
            "head/kernel": rng.normal(0, 0.2, (encoder.info.width, count)).astype(np.float32),
            "head/bias": rng.normal(size=count).astype(np.float32),
        }
        metadata = dataclasses.replace(encoder.info, num_classes=count, **info)
        return dataclasses.replace(encoder, arrays=encoder.arrays | head, info=metadata)

    return make


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def rows_of(picture, checkpoint, *flags):
    out = picture.parent / "p.csv"
    predict.main([str(picture), "--checkpoint", str(checkpoint), "--out", str(out), *flags])
    return list(csv.DictReader(out.read_text().splitlines()))


def logits_of(picture, checkpoint):
    model, params = mae_jax.load(checkpoint)
    return np.asarray(model.logits(params, model.read_images(picture)))[0]


@pytest.mark.parametrize("dialect", ["hf", "timm", "mae_jax"])
def test_multi_label(classifier, picture, tmp_path, dialect, capsys):
    names = tuple("abcdefg")
    made = classifier(7, problem_type=MULTI, class_names=names)
    weights.write(made, tmp_path / "model", dialect)
    assert weights.read(tmp_path / "model").info.problem_type == MULTI
    rows = rows_of(picture, tmp_path / "model")
    expected = 1 / (1 + np.exp(-logits_of(picture, tmp_path / "model")))
    assert sorted(row["name"] for row in rows) == list(names), "all classes, not the first five"
    found = {row["name"]: float(row["probability"]) for row in rows}
    np.testing.assert_allclose([found[name] for name in names], expected, atol=1e-6)
    assert [row["rank"] for row in rows] == list("1234567")
    assert {row["threshold"] for row in rows} == {"0.5"}
    for row in rows:
        assert row["positive"] == str(int(float(row["probability"]) >= 0.5))
    assert {row["positive"] for row in rows} == {"0", "1"}
    assert "+ " in capsys.readouterr().out
    strict = rows_of(picture, tmp_path / "model", "--threshold", "0.9999", "--top", "2")
    assert [(row["threshold"], row["positive"]) for row in strict] == [("0.9999", "0")] * 2
    positives = [row for row in rows if row["positive"] == "1"]
    assert len(positives) > 1
    assert rows_of(picture, tmp_path / "model", "--top", "1") == positives


@pytest.mark.parametrize(("count", "problem_type"), [(1, ""), (1, "regression"), (3, "regression")])
def test_regression(classifier, picture, tmp_path, caplog, count, problem_type):
    """One output without a problem type is a regression, as in transformers' training."""
    weights.write(classifier(count, problem_type=problem_type), tmp_path / "model", "hf")
    rows = rows_of(picture, tmp_path / "model")
    assert list(rows[0]) == ["file", "output", "name", "value"]
    values = [float(row["value"]) for row in rows]
    np.testing.assert_allclose(values, logits_of(picture, tmp_path / "model"), rtol=1e-5)
    assert [row["name"] for row in rows] == [f"output {number}" for number in range(count)]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.get("problem_type", "") == problem_type
    assert ("its one output has no problem_type" in caplog.text) == (not problem_type)


def test_single_label_is_a_softmax(classifier, picture, tmp_path):
    weights.write(classifier(3), tmp_path / "model", "hf")
    rows = rows_of(picture, tmp_path / "model")
    assert list(rows[0]) == ["file", "rank", "class", "name", "probability"]
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-5)


def test_flags_of_other_heads(classifier, picture, tmp_path, capsys):
    weights.write(classifier(3), tmp_path / "single", "hf")
    weights.write(classifier(3, problem_type="regression"), tmp_path / "values", "hf")
    with pytest.raises(ConvertError, match="--threshold is for multi-label heads"):
        rows_of(picture, tmp_path / "single", "--threshold", "0.3")
    weights.write(classifier(3, problem_type=MULTI), tmp_path / "multi", "hf")
    for threshold in ("50", "nan", "0", "x"):
        with pytest.raises(SystemExit):
            rows_of(picture, tmp_path / "multi", "--threshold", threshold)
        assert f"'{threshold}' is not a number above 0 and at most 1" in capsys.readouterr().err
    with pytest.raises(ConvertError, match="--top is for classes"):
        rows_of(picture, tmp_path / "values", "--top", "1")


def test_unknown_problem_types(classifier, tmp_path):
    weights.write(classifier(1), tmp_path / "model", "hf")
    file = tmp_path / "model/config.json"
    config = json.loads(file.read_text())
    for problem_type, message in (
        ("multilabel", "problem_type='multilabel' is unknown: set it to one of single_label"),
        (["regression"], "problem_type=.'regression'. is unknown"),
        ("single_label_classification", "must be another one for a single output"),
    ):
        file.write_text(json.dumps(config | {"problem_type": problem_type}))
        with pytest.raises(ConvertError, match=message):
            weights.read(tmp_path / "model")


def test_other_problem_types_have_no_accuracy(classifier, tmp_path):
    made = classifier(3, problem_type=MULTI)
    weights.write(made, tmp_path / "model", "hf")
    model, _ = mae_jax.load(tmp_path / "model")
    with pytest.raises(Exception, match=f"predicts {MULTI}, which has no accuracy"):
        _check_head(model, ("a", "b", "c"))
    with pytest.raises(ConvertError, match=f"its head is for {MULTI}.*init.new_head=True"):
        check_head(made, made.arrays, "cls", ("a", "b", "c"))


@pytest.mark.parametrize(
    ("config", "names", "warning"),
    [
        ({}, (), ""),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, (), ""),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b"), ""),
        (
            {"id2label": dict(zip(map(str, [10, *range(10)]), "kabcdefghij"))},
            "abcdefghijk",
            "",
        ),
        ({"label2id": {"b": 1, "a": 0}}, ("a", "b"), ""),
        ({"id2label": {"0": 7, "1": "b"}}, ("7", "b"), ""),
        ({"id2label": {"0": "a", "2": "c"}}, (), "does not name every class from 0 to 2"),
        ({"id2label": {"1": "a", "2": "c"}}, (), "does not name every class from 0 to 2"),
        ({"id2label": {"0": "a", "1": None}}, (), "does not name every class from 0 to 1"),
        ({"id2label": {"0": "a", "1": "a"}}, ("a", "a"), "several classes are called a"),
    ],
    ids=str,
)
def test_class_names(caplog, config, names, warning):
    assert parse_hf_config(config)["class_names"] == tuple(names)
    assert warning in caplog.text
    assert bool(caplog.text) == bool(warning)


@pytest.mark.parametrize("names", [["a", "b"], {"x": "a"}])
def test_class_names_of_another_form_name_the_key(names):
    with pytest.raises(ConvertError, match="id2label must be an object of names by class number"):
        parse_hf_config({"id2label": names})


def test_classes_of_the_same_name(classifier, picture, tmp_path, capsys):
    """They are told apart by their number, also after another conversion."""
    weights.write(classifier(3, class_names=("a", "a", "b")), tmp_path / "model", "hf")
    weights.write(weights.read(tmp_path / "model"), tmp_path / "again", "hf")
    rows = rows_of(picture, tmp_path / "again")
    assert {(row["class"], row["name"]) for row in rows} == {("0", "a"), ("1", "a"), ("2", "b")}
    printed = capsys.readouterr().out
    assert "a (class 0)" in printed
    assert "b (class 2)" not in printed
