"""Results of `python -m mae_jax.evaluate` as a report and as tables."""

import argparse
from collections.abc import Sequence
from typing import Any

import jax

import mae_jax
from mae_jax.evaluate.suite import RankResult, SplitFeatures, SuiteResult
from mae_jax.utils import console


def make_report(
    arguments: argparse.Namespace,
    splits: SplitFeatures,
    results: Sequence[SuiteResult | RankResult],
) -> dict[str, Any]:
    """Return what --out holds, as JSON."""
    return {
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "train_split": arguments.train_split,
        "eval_split": arguments.eval_split,
        "train_images": len(splits.train.labels) if splits.train else 0,
        "eval_images": len(splits.test.labels),
        "classes": splits.num_classes,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"mae_jax": mae_jax.__version__, "jax": jax.__version__},
        "results": [_row(result) for result in results],
    }


def _row(result: SuiteResult | RankResult) -> dict[str, Any]:
    if isinstance(result, RankResult):
        return vars(result)
    return {
        "measure": result.measure,
        "features": result.features,
        **vars(result.score),
        "interval": result.score.interval,
        "spread": result.spread,
        "seconds": result.seconds,
    }


def print_results(results: Sequence[SuiteResult | RankResult], title: str) -> None:
    """Print a table of accuracies, and one of ranks."""
    accuracies = [result for result in results if isinstance(result, SuiteResult)]
    ranks = [result for result in results if isinstance(result, RankResult)]
    if accuracies:
        _print_accuracies(accuracies, title)
    if ranks:
        rows = [
            (r.measure, r.features, f"{r.rank:.1f}", r.images, f"{r.seconds:.1f}") for r in ranks
        ]
        columns = ("measure", "features", "effective rank", "training images", "s")
        console.print_table(title, columns, rows)


def _print_accuracies(results: Sequence[SuiteResult], title: str) -> None:
    layers = [result for result in results if "_" in result.features]
    best = max(layers, key=lambda result: result.score.top1, default=None)
    rows = []
    for result in results:
        low, high = result.score.interval
        spread = f"±{result.spread:.3f}" if result.spread is not None else ""
        rows.append(
            (
                "best layer" if result is best else result.measure,
                result.features,
                f"{result.score.top1:.3f}{spread}",
                f"{low:.2f}-{high:.2f}",
                f"{result.score.top5:.3f}",
                result.score.images,
                f"{result.seconds:.1f}",
            )
        )
    columns = ("measure", "features", "top-1", "95 %", "top-5", "images", "s")
    console.print_table(title, columns, rows)
