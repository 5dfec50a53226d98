"""Weighted k-NN against a loop over the queries, and extraction of features."""

import json

import numpy as np
import pytest

from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.evaluate.knn import knn_scores


def reference(bank, labels, queries, k, temperature):
    """Predict the classes of the queries, one by one."""
    predictions = []
    for query in queries:
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-cosine)[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


def make_sets(count=300, queries=101, classes=5):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count + queries, 8)).astype(np.float32)
    return vectors[:count], rng.integers(0, classes, count), vectors[count:]


@pytest.mark.parametrize("tiles", [dict(), dict(query_tile=32, bank_tile=64)], ids=["one", "many"])
def test_votes_are_weighted_by_similarity(tiles):
    bank, labels, queries = make_sets()
    for k in (1, 10, 1000):
        expected = reference(bank, labels, queries, min(k, len(bank)), 0.07)
        # With the predictions of the reference as labels, equal predictions have an accuracy of 1.
        scores = knn_scores(bank, labels, queries, expected, num_classes=5, ks=(k,), **tiles)
        assert scores[k].top1 == 1.0
        wrong = (expected + 1) % 5
        scores = knn_scores(bank, labels, queries, wrong, num_classes=5, ks=(k,), **tiles)
        assert scores[k].top1 == 0.0


def test_accuracies_of_the_knn_classifier_of_pixio(golden):
    """Classes without a vote are in any order, so some images may be in the top 5 or not."""
    recorded = json.loads((golden / "pixio/knn.json").read_text())
    with np.load(golden / "pixio/knn.npz") as arrays:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        sets = [arrays[name] for name in names]
    ks = [result["k"] for result in recorded["results"]]
    scores = knn_scores(*sets, num_classes=recorded["classes"], ks=ks)
    for result in recorded["results"]:
        score = scores[result["k"]]
        assert 100 * score.top1 == pytest.approx(result["top1"])
        undecided = 100 * result["top5_undecided_images"] / len(sets[-1])
        assert abs(100 * score.top5 - result["top5"]) <= undecided


def test_several_k_and_top_5():
    bank, labels, queries = make_sets(classes=20)
    truth = reference(bank, labels, queries, 5, 0.07)
    together = knn_scores(bank, labels, queries, truth, num_classes=20, ks=(1, 5, 20))
    for k, score in together.items():
        alone = knn_scores(bank, labels, queries, truth, num_classes=20, ks=(k,))[k]
        assert score == alone
        assert score.top5 >= score.top1
        assert score.images == 101
    assert together[5].top1 == 1.0
    # One neighbor votes for one class; classes without a vote are not predicted.
    assert together[1].top5 == together[1].top1 < 1.0


def test_zero_features_do_not_give_nan():
    bank, labels, queries = make_sets()
    bank[0] = queries[0] = 0.0
    score = knn_scores(bank, labels, queries, labels[:101], num_classes=5)[10]
    assert 0 <= score.top1 <= 1


def test_padding_is_dropped_from_extracted_features():
    def batches():
        for start in range(0, 12, 4):
            index = np.arange(start, start + 4)
            yield {"image": index[:, None], "label": index % 3, "valid": index < 10}

    functions = lambda x: {"a": x * 2.0, "b": -x}
    extracted = extract_features(functions, EvalBatches(12, batches), show_progress=True)
    np.testing.assert_array_equal(extracted.features["a"][:, 0], 2 * np.arange(10))
    np.testing.assert_array_equal(extracted.features["b"][:, 0], -np.arange(10))
    np.testing.assert_array_equal(extracted.labels, np.arange(10) % 3)
