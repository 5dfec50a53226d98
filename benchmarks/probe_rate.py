"""The peak learning rate of linear probes on few images, against logistic regression.

    python -m benchmarks.probe_rate --checkpoint runs/demo [--out FILE.json]

Features are the cls token of the embedded photographs. The paper's rule, .1 * batch / 256, is among
the rates; logistic regression (scikit-learn, standardised features) has the best of four penalties.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression

import mae_jax
from mae_jax.data.factory import open_source
from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.evaluate.probe import ProbeRecipe, batch_size_for, probe_scores

COUNTS = (190, 950, 7600)
RATES = (1.0, 3.0, 6.4, 12.8)
PENALTIES = (0.01, 0.1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data-dir", default="datasets")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model, params = mae_jax.load(arguments.checkpoint)
    features = jax.jit(lambda images: {"cls": model.features(params, images)["cls"]})

    def cls_of(split: str) -> tuple[np.ndarray, np.ndarray]:
        source = open_source("tfds", "photo_crops", arguments.data_dir, split)
        images = EvalBatches(len(source), lambda: model.batches(source, 256))
        found, labels = extract_features(features, images)
        return found["cls"], labels

    train, labels = cls_of("train")
    test, test_labels = cls_of("test")
    order = np.random.default_rng(0).permutation(len(labels))
    rows = []
    for count in COUNTS:
        some = order[:count]
        data = {"cls": train[some]}, labels[some], {"cls": test}, test_labels
        row: dict[str, float] = {"images": count, "batch": batch_size_for(count)}
        for rate in (0.1 * batch_size_for(count) / 256, *RATES):
            recipe = ProbeRecipe(learning_rate=rate)
            score = probe_scores(*data, num_classes=19, recipe=recipe)["cls"]
            row["paper's rule" if rate not in RATES else f"rate {rate}"] = round(score.top1, 4)
        mean, std = train[some].mean(axis=0), train[some].std(axis=0) + 1e-6
        best = max(
            LogisticRegression(C=c, max_iter=1000)
            .fit((train[some] - mean) / std, labels[some])
            .score((test - mean) / std, test_labels)
            for c in PENALTIES
        )
        rows.append(row | {"logistic regression": round(float(best), 4)})
        print(rows[-1])
    if arguments.out:
        report = {"command": "python -m benchmarks.probe_rate --checkpoint runs/demo", "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
