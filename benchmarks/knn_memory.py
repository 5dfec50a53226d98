"""Memory and time of k-NN with a bank of ImageNet's size: 1,281,167 features of 768.

    python -m benchmarks.knn_memory [--queries 2048] [--out benchmarks/results/knn_memory.json]

The bank is random, which changes neither memory nor time. Peak memory of the process includes the
bank twice on a CPU: as the caller has it, and on the "device".
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np

from mae_jax.evaluate.knn import BANK_TILE, QUERY_TILE, knn_scores

BANK, WIDTH, CLASSES = 1_281_167, 768, 1000
KS = (1, 5, 10, 20, 100, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((BANK, WIDTH), np.float32)
    labels = rng.integers(0, CLASSES, BANK)
    queries = bank[: arguments.queries] + rng.standard_normal(
        (arguments.queries, WIDTH), np.float32
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    scores = knn_scores(
        bank, labels, queries, labels[: arguments.queries], num_classes=CLASSES, ks=KS
    )
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {
        "command": "python -m benchmarks.knn_memory",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
        "bank": [BANK, WIDTH],
        "bank_gb": bank.nbytes / 1e9,
        "queries": arguments.queries,
        "tiles": {"queries": QUERY_TILE, "bank": BANK_TILE},
        "peak_gb": peak * 1024 / 1e9,
        "beyond_the_callers_gb": (peak - before) * 1024 / 1e9,
        "queries_per_second": arguments.queries / seconds,
        "top1_k1": scores[1].top1,  # each query's nearest is the vector that it was made of
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
