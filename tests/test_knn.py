import numpy as np
import pytest

from mae_jax.evals.knn import Knn, extract, knn_accuracy


def reference(bank, labels, queries, k, temperature):
    """The same vote, written out query by query."""
    answers = []
    for query in queries:
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(labels.max() + 1)
        for i in np.argsort(-cosine)[:k]:
            votes[labels[i]] += np.exp(cosine[i] / temperature)
        answers.append(votes.argmax())
    return np.array(answers)


@pytest.mark.parametrize("k", [1, 10])
def test_votes_are_weighted_by_similarity(k):
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(300, 8)), rng.normal(size=(101, 8))
    bank, queries = bank.astype(np.float32), queries.astype(np.float32)
    labels = rng.integers(0, 5, 300)
    expected = reference(bank, labels, queries, k, 0.07)
    # Labelling the queries with the reference's answers makes agreement an accuracy of 1.
    accuracy = knn_accuracy(bank, labels, queries, expected, k=k, temperature=0.07, tile=32)
    assert accuracy == 1.0
    wrong = (expected + 1) % 5
    assert knn_accuracy(bank, labels, queries, wrong, k=k, temperature=0.07) == 0.0


def test_a_bank_smaller_than_k():
    x = np.eye(3, dtype=np.float32)
    assert knn_accuracy(x, np.arange(3), x, np.arange(3), k=10, temperature=0.07) == 1.0


def batches():
    for start in range(0, 12, 4):
        index = np.arange(start, start + 4)
        yield {"image": index[:, None], "label": index % 3, "valid": index < 10}


def test_padding_is_left_out():
    features, labels = extract({"a": lambda x: x * 2.0, "b": lambda x: -x}, batches())
    np.testing.assert_array_equal(features["a"][:, 0], 2 * np.arange(10))
    np.testing.assert_array_equal(features["b"][:, 0], -np.arange(10))
    np.testing.assert_array_equal(labels, np.arange(10) % 3)


def test_evaluator_tells_good_features_from_bad():
    one_hot = lambda x: np.eye(3, dtype=np.float32)[x[:, 0] % 3]
    constant = lambda x: np.ones((len(x), 2), np.float32)
    knn = Knn(batches, batches, k=3, temperature=0.07)
    found = knn.run({"good": one_hot, "bad": constant})
    assert found["good"] == 1.0
    assert found["bad"] < 0.5
