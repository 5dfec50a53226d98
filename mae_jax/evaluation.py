"""What a run is judged by: k-NN and pictures while it trains, a summary at its end."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.console import print_table
from mae_jax.evals.knn import FeatureFn, Knn
from mae_jax.evals.reconstruct import Pictures, save_png
from mae_jax.metrics import RunLog, write_json
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.training import TrainState

log = logging.getLogger("mae_jax")

RANDOM_ENCODERS = 3  # whose mean accuracy is the baseline


@dataclass(frozen=True)
class Evaluation:
    """Evaluates states of one run; results go to its log and into its workdir.

    knn is None where there is nothing to measure it on. With `baseline_key` the end of the run
    also measures raw pixels, and encoders initialised from that key.
    """

    task: Pretrain
    run_log: RunLog
    workdir: Path
    pictures: Pictures
    knn: Knn | None
    baseline_key: Key[Array, ""] | None

    def measure_knn(self, step: int, state: TrainState) -> None:
        """Logs the k-NN accuracy of the encoder's features."""
        assert self.knn is not None
        found = self.knn.run({"knn_top1": self._features(state.params)})
        self.run_log.scalars(step, found)
        log.info("step %d: k-NN top-1 %.3f", step, found["knn_top1"])

    def draw_pictures(self, step: int, state: TrainState) -> Path:
        """Writes pictures/step_*.png and says where it lies."""
        picture = self.pictures.run(state.params)
        path = self.workdir / "pictures" / f"step_{step:07d}.png"
        save_png(path, picture)
        self.run_log.image(step, "reconstruction", picture)
        return path

    def finish(self, step: int, state: TrainState) -> None:
        """The last evaluation: pictures, k-NN with its baselines, summary.json and its table."""
        pictures = self.draw_pictures(step, state)
        found = self._final_knn(state)
        if found:
            self.run_log.scalars(step, found)
        rates, losses = (self.run_log.column(name) for name in ("images_per_second", "loss"))
        summary = found | {
            "final_loss": losses[-1] if losses else None,
            "images_per_second": float(np.median(rates)) if rates else None,
            "steps": step,
            "pictures": str(pictures),
        }
        write_json(self.workdir / "summary.json", summary)
        print_summary(summary)

    def _features(self, params: Any) -> FeatureFn:
        function = jax.jit(self.task.features)
        return lambda images: function(params, images)

    def _final_knn(self, state: TrainState) -> dict[str, float]:
        """Accuracies of the encoder and, where asked for, of the baselines, by the same call."""
        if self.knn is None:
            return {}
        features = {"knn_top1": self._features(state.params)}
        if self.baseline_key is None:
            return self.knn.run(features)
        features["knn_top1_pixels"] = lambda images: np.float32(images).reshape(len(images), -1)
        random = [f"random_{number}" for number in range(RANDOM_ENCODERS)]
        for number, name in enumerate(random):
            key = jax.random.fold_in(self.baseline_key, 1 + number)
            features[name] = self._features(jax.jit(self.task.init)(key))
        found = self.knn.run(features)
        return found | {"knn_top1_random_init": float(np.mean([found.pop(n) for n in random]))}


def summary_of(workdir: Path, step: int) -> dict[str, Any] | None:
    """The summary in a workdir, if it is of that step."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return summary if summary.get("steps") == step else None


def print_summary(summary: Mapping[str, Any]) -> None:
    """A short table of what a run came to."""
    names = {
        "knn_top1": "k-NN top-1, this encoder",
        "knn_top1_random_init": f"k-NN top-1, random encoder (mean of {RANDOM_ENCODERS})",
        "knn_top1_pixels": "k-NN top-1, raw pixels",
        "final_loss": "final loss",
        "images_per_second": "images per second",
        "pictures": "pictures",
    }
    rows = {label: summary[name] for name, label in names.items() if summary.get(name) is not None}
    print_table(f"After {summary['steps']} steps", rows)
