"""Measures of frozen features, in runs and in `mae-jax evaluate`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mae_jax.data.subsets import sample_shots
from mae_jax.distributed.inference import (
    EvalBatches,
    FeaturesFn,
    LabeledFeatures,
    extract_features,
)
from mae_jax.evaluate.knn import knn_scores
from mae_jax.evaluate.metrics import Score, accuracy
from mae_jax.evaluate.probe import ProbeRecipe, probe_scores
from mae_jax.evaluate.rankme import MAX_IMAGES, rankme

KS = (1, 5, 10, 20, 100, 200)
DRAWS = 5  # few-shot training sets
DEFAULT_RECIPE = ProbeRecipe()


@dataclass(frozen=True)
class SplitFeatures:
    """Features of the images to train on and to evaluate on, in memory.

    Args:
      train: None for the measure "head", which trains nothing.
      test: without features for the measure "rankme", which needs no evaluation.
      report: called with what is being computed.
    """

    train: LabeledFeatures | None
    test: LabeledFeatures
    num_classes: int
    report: Callable[[str], None] = lambda _: None

    def knn(
        self, names: Sequence[str], ks: Sequence[int], temperature: float = 0.07
    ) -> dict[str, dict[int, Score]]:
        """Return k-NN scores by name of the features and by k."""
        assert self.train is not None
        scores = {}
        for name in names:
            self.report(f"k-NN of {name}")
            scores[name] = knn_scores(
                self.train.features[name],
                self.train.labels,
                self.test.features[name],
                self.test.labels,
                num_classes=self.num_classes,
                ks=ks,
                temperature=temperature,
            )
        return scores

    def rankme(self, names: Sequence[str]) -> dict[str, float]:
        """Return the effective rank of the training images' features by name of the features."""
        assert self.train is not None
        ranks = {}
        for name in names:
            self.report(f"RankMe of {name}")
            ranks[name] = rankme(self.train.features[name])
        return ranks

    def probe(
        self,
        names: Sequence[str],
        recipe: ProbeRecipe = DEFAULT_RECIPE,
        *,
        rows: Sequence[int] | slice = slice(None),
        attention_heads: int = 0,
    ) -> dict[str, Score]:
        """Train probes together, on features of one shape; return scores by name of the features.

        Args:
          rows: training images to use.
          attention_heads: of attention pooling, for features [n, patches, d].
        """
        assert self.train is not None
        self.report(f"training probes of {', '.join(names)}")
        return probe_scores(
            {name: self.train.features[name][rows] for name in names},
            self.train.labels[rows],
            {name: self.test.features[name] for name in names},
            self.test.labels,
            num_classes=self.num_classes,
            attention_heads=attention_heads,
            recipe=recipe,
        )


def extract_splits(
    features_fn: FeaturesFn,
    train: EvalBatches | None,
    test: EvalBatches | None,
    num_classes: int,
    *,
    show_progress: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> SplitFeatures:
    """Compute the features of both splits; every image is read once.

    Args:
      report: as in SplitFeatures.
    """

    def extract(images: EvalBatches, split: str) -> LabeledFeatures:
        report(f"features of {images.count} {split} images")
        return extract_features(features_fn, images, show_progress=show_progress)

    train_features = extract(train, "training") if train else None
    nothing = LabeledFeatures({}, np.zeros(0, np.int32))
    test_features = extract(test, "evaluation") if test else nothing
    return SplitFeatures(train_features, test_features, num_classes, report)


@dataclass(frozen=True)
class SuiteResult:
    """A row of the results; spread is the standard deviation if the score is a mean."""

    measure: str
    features: str
    score: Score
    spread: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class RankResult:
    """Effective rank of the features of `images` training images, a row of the results."""

    measure: str
    features: str
    rank: float
    images: int
    seconds: float = 0.0


@dataclass(frozen=True)
class SuiteOptions:
    """Settings of the measures.

    Args:
      attention_heads: of attentive probes.
      shots: images per class of few-shot training sets.
    """

    recipe: ProbeRecipe
    attention_heads: int
    shots: int
    classes: Sequence[str]


@dataclass(frozen=True)
class Measure:
    """A measure of the suite, and its description for --help."""

    description: str
    run: Callable[[SplitFeatures, SuiteOptions], Sequence[SuiteResult | RankResult]]


def measure(
    name: str, splits: SplitFeatures, options: SuiteOptions
) -> list[SuiteResult | RankResult]:
    """Return the results of a measure of SUITE, each with its share of the time."""
    begin = time.perf_counter()
    results = SUITE[name].run(splits, options)
    seconds = round((time.perf_counter() - begin) / len(results), 2)
    return [dataclasses.replace(result, seconds=seconds) for result in results]


def _global_names(splits: SplitFeatures) -> list[str]:
    """Return the features of whole images; "global" is of models with several class tokens."""
    assert splits.train is not None
    return [name for name in ("global", "mean", "cls") if name in splits.train.features]


def _knn(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    del options
    assert splits.train is not None
    ks = [k for k in KS if k <= len(splits.train.labels)]
    return [
        SuiteResult(f"k-NN, k = {k}", name, score)
        for name, scores in splits.knn(_global_names(splits), ks).items()
        for k, score in scores.items()
    ]


def _rankme(splits: SplitFeatures, options: SuiteOptions) -> list[RankResult]:
    del options
    assert splits.train is not None
    images = min(len(splits.train.labels), MAX_IMAGES)
    ranks = splits.rankme(_global_names(splits))
    return [RankResult("RankMe", name, rank, images) for name, rank in ranks.items()]


def _linear(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    return _probe_rows("linear probe", splits.probe(["cls", "mean"], options.recipe))


def _attentive(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    heads = options.attention_heads
    scores = splits.probe(["patches"], options.recipe, attention_heads=heads)
    return _probe_rows("attentive probe", scores)


def _layers(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    names = [name for name in splits.test.features if name.startswith(("cls_", "mean_"))]
    return _probe_rows("linear probe", splits.probe(names, options.recipe))


def _probe_rows(label: str, scores: dict[str, Score]) -> list[SuiteResult]:
    return [SuiteResult(label, name, score) for name, score in scores.items()]


def _few_shot(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    """Return means over training sets of seeds 0, 1, ..., for any seed of the probes."""
    assert splits.train is not None
    names, labels = ["cls", "mean"], splits.train.labels
    draws = [
        sample_shots(
            lambda i: int(labels[i]), len(labels), options.classes, options.shots, seed=seed
        )
        for seed in range(DRAWS)
    ]
    scores = [splits.probe(names, options.recipe, rows=rows) for rows in draws]
    results = []
    for name in names:
        top1 = np.array([score[name].top1 for score in scores])
        top5 = np.array([score[name].top5 for score in scores])
        score = Score(float(top1.mean()), float(top5.mean()), len(splits.test.labels))
        label, spread = f"linear, {options.shots}-shot", float(top1.std(ddof=1))
        results.append(SuiteResult(label, name, score, spread))
    return results


def _head(splits: SplitFeatures, options: SuiteOptions) -> list[SuiteResult]:
    del options
    score = accuracy(splits.test.features["ranking"], splits.test.labels)
    return [SuiteResult("its own head", "", score)]


SUITE = {
    "knn": Measure("k nearest neighbors, of cls, mean of the patches and global", _knn),
    "linear": Measure("linear probe of cls and mean", _linear),
    "attentive": Measure("attentive probe: a learned query over the patches", _attentive),
    "layers": Measure("linear probes of cls and mean after every block", _layers),
    "few_shot": Measure("linear probes on a few images per class, mean of 5 samples", _few_shot),
    "rankme": Measure(
        "effective rank of cls, mean and global; needs no labels and no evaluation split", _rankme
    ),
    "head": Measure("the checkpoint's own head", _head),
}
