"""The measurements of `python -m mae_jax.evaluate`, on features that are in memory."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

from mae_jax.data.subsets import sample_shots
from mae_jax.evaluate.knn import knn_scores
from mae_jax.evaluate.metrics import Score, accuracy
from mae_jax.evaluate.probe import ProbeRecipe, probe_scores

SUITE = {
    "knn": "k nearest neighbours, of cls and mean of the patches",
    "linear": "linear probe of cls and mean",
    "attentive": "attentive probe: a learned query over the patches",
    "layers": "linear probes of cls and mean after every block",
    "few_shot": "linear probes on a few images per class, mean of 5 draws",
    "head": "the checkpoint's own head",
}
KS = (1, 5, 10, 20, 100, 200)
DRAWS = 5  # of few-shot training sets


@dataclass(frozen=True)
class SuiteResult:
    """One line of the table; spread is a standard deviation where the score is a mean."""

    measure: str
    features: str
    score: Score
    spread: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class LabeledFeatures:
    """Features by name, and the labels, of some images."""

    features: dict[str, Shaped[np.ndarray, "n ..."]]
    labels: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Suite:
    """What to learn from and what to judge on.

    train is None where only "head" is measured. heads: of the encoder, which attentive probes have
    too; shots: images of every class for "few_shot".
    """

    train: LabeledFeatures | None
    test: LabeledFeatures
    classes: Sequence[str]
    heads: int
    recipe: ProbeRecipe
    shots: int

    def measure(self, name: str) -> list[SuiteResult]:
        """The rows of one of SUITE, each with its share of the time."""
        begin = time.perf_counter()
        rows: list[SuiteResult] = getattr(self, f"_{name}")()
        seconds = round((time.perf_counter() - begin) / len(rows), 2)
        return [dataclasses.replace(row, seconds=seconds) for row in rows]

    def _head(self) -> list[SuiteResult]:
        score = accuracy(self.test.features["ranking"], self.test.labels)
        return [SuiteResult("its own head", "", score)]

    def _knn(self) -> list[SuiteResult]:
        assert self.train is not None
        rows = []
        for pool in ("mean", "cls"):
            scores = knn_scores(
                self.train.features[pool],
                self.train.labels,
                self.test.features[pool],
                self.test.labels,
                num_classes=len(self.classes),
                ks=[k for k in KS if k <= len(self.train.labels)],
            )
            rows += [SuiteResult(f"k-NN, k = {k}", pool, score) for k, score in scores.items()]
        return rows

    def _linear(self) -> list[SuiteResult]:
        return [
            SuiteResult("linear probe", *found) for found in self._probe(["cls", "mean"]).items()
        ]

    def _layers(self) -> list[SuiteResult]:
        names = [name for name in self.test.features if name.startswith(("cls_", "mean_"))]
        return [SuiteResult("linear probe", *found) for found in self._probe(names).items()]

    def _attentive(self) -> list[SuiteResult]:
        found = self._probe(["patches"], attention_heads=self.heads)
        return [SuiteResult("attentive probe", "patches", found["patches"])]

    def _few_shot(self) -> list[SuiteResult]:
        """Means over training sets drawn with seeds 0, 1, ..., whatever the seed of probes."""
        assert self.train is not None
        names, labels = ["cls", "mean"], self.train.labels
        draws = [
            sample_shots(lambda i: int(labels[i]), len(labels), self.classes, self.shots, seed)
            for seed in range(DRAWS)
        ]
        found = [self._probe(names, np.array(numbers)) for numbers in draws]
        rows = []
        for name in names:
            top1, top5 = (
                np.array([getattr(scores[name], top) for scores in found])
                for top in ("top1", "top5")
            )
            score = Score(float(top1.mean()), float(top5.mean()), len(self.test.labels))
            rows.append(
                SuiteResult(f"linear, {self.shots}-shot", name, score, float(top1.std(ddof=1)))
            )
        return rows

    def _probe(
        self, names: Sequence[str], rows: np.ndarray | None = None, attention_heads: int = 0
    ) -> dict[str, Score]:
        """Probes of some features, on all training images or on some."""
        assert self.train is not None
        train: dict[str, Float[np.ndarray, "n ..."]] = {n: self.train.features[n] for n in names}
        labels = self.train.labels
        if rows is not None:
            train, labels = {name: x[rows] for name, x in train.items()}, labels[rows]
        return probe_scores(
            train,
            labels,
            {name: self.test.features[name] for name in names},
            self.test.labels,
            num_classes=len(self.classes),
            attention_heads=attention_heads,
            recipe=self.recipe,
        )
