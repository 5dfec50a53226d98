"""What a run is judged by: evaluators while it trains, and a summary at its end."""

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.distributed import processes, sharding
from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.evaluate.figures import ReconstructionFigure, save_png
from mae_jax.evaluate.knn import knn_scores
from mae_jax.evaluate.metrics import Score, accuracy, top_k
from mae_jax.evaluate.probe import probe_scores
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import Hook, TrainState
from mae_jax.train.metrics_writer import MetricsLogger
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_summary_table

log = logging.getLogger("mae_jax.run")

RANDOM_ENCODERS = 3  # whose mean accuracy is the baseline
Results = dict[str, Any]


class Evaluator(Protocol):
    """Judges a state."""

    @property
    def every(self) -> int | None:
        """Steps between two judgements; None at the end of the run only."""
        ...

    def run(self, step: int, state: TrainState) -> Results:
        """Results by name, while the run goes on."""
        ...

    def finish(self, step: int, state: TrainState) -> Results:
        """Results by name, at its end."""
        ...


def with_sharded_inputs(
    compiled: Callable[..., Any], mesh: jax.sharding.Mesh, *state: Any
) -> Callable[[np.ndarray], Any]:
    """A jitted function of state and images as one of a batch of images, split over all devices."""
    return lambda images: compiled(*state, sharding.shard_batch({"image": images}, mesh)["image"])


@dataclass(frozen=True)
class ReconstructionEvaluator:
    """Reconstructions of the same images, in pictures/step_*.png."""

    pictures: ReconstructionFigure
    run_log: MetricsLogger
    folder: Path
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Writes a picture, which all processes compute."""
        made = self.pictures.reconstruct(state.params)
        if not processes.is_main():
            return {}
        picture = self.pictures.draw(made)
        path = self.folder / f"step_{step:07d}.png"
        save_png(path, picture)
        self.run_log.image(step, "reconstruction", picture)
        return {"pictures": str(path)}

    finish = run


@dataclass(frozen=True)
class AccuracyEvaluator:
    """top1 and top5 of the classifier, and of its averaged parameters where they are kept."""

    task: Classify
    images: EvalBatches
    mesh: jax.sharding.Mesh
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Over the whole evaluation split."""
        return self._measure(state)[0]

    def finish(self, step: int, state: TrainState) -> Results:
        """The same, with the number of images, a confidence interval and the time."""
        begin = time.perf_counter()
        found, score = self._measure(state)
        return found | {
            "top1_interval": list(score.interval),
            "eval_images": score.images,
            "eval_seconds": round(time.perf_counter() - begin, 2),
        }

    def _measure(self, state: TrainState) -> tuple[Results, Score]:
        score = self._score(state.params, state)
        found: Results = {"top1": score.top1, "top5": score.top5}
        if state.ema is not None:
            averaged = self._score(state.ema, state)
            found |= {"top1_ema": averaged.top1, "top5_ema": averaged.top5}
        return found, score

    def _score(self, params: Any, state: TrainState) -> Score:
        function = with_sharded_inputs(self._ranking, self.mesh, params, state.batch_stats)
        found, labels = extract_features(function, self.images)
        return accuracy(found["ranking"], labels)

    @cached_property  # compiled once in a run
    def _ranking(self) -> Callable[..., dict[str, Array]]:
        def ranking(params: Any, stats: Any, images: Array) -> dict[str, Array]:
            logits = self.task.outputs(params, stats, images).logits
            assert logits is not None
            return {"ranking": top_k(logits)}

        return jax.jit(ranking)


@dataclass(frozen=True)
class FeatureEvaluator:
    """k-NN of the encoder's features; at the end also a linear probe and baselines if asked for.

    ks: the first is logged while training. baseline_key: random encoders are initialised from it;
    None has no baselines.
    """

    task: Pretrain | Classify
    bank: EvalBatches
    queries: EvalBatches
    num_classes: int
    ks: tuple[int, ...]
    temperature: float
    mesh: jax.sharding.Mesh
    every: int | None
    linear: bool = False
    baseline_key: Key[Array, ""] | None = None
    note: Callable[[str], None] = lambda _: None  # is told what is being done

    def run(self, step: int, state: TrainState) -> Results:
        """k-NN accuracy of the encoder."""
        return self._measure({"": state.params}, self.ks[:1], linear=False)

    def finish(self, step: int, state: TrainState) -> Results:
        """Everything that was asked for, of the encoder and of the baselines."""
        kinds: dict[str, Any] = {"": state.params}
        if self.baseline_key is None:
            return self._measure(kinds, self.ks, linear=self.linear)
        kinds["_pixels"] = None
        layout = jax.tree.map(lambda x: x.sharding, state.params)
        init = jax.jit(self.task.init, out_shardings=layout)
        for number in range(RANDOM_ENCODERS):
            key = jax.random.fold_in(self.baseline_key, 1 + number)
            kinds[f"_random_init_{number}"] = init(key)
        found = self._measure(kinds, self.ks, linear=self.linear)
        for name in [name for name in found if name.endswith("_random_init_0")]:
            common = name.removesuffix("_0")
            values = [found.pop(f"{common}_{number}") for number in range(RANDOM_ENCODERS)]
            found[common] = float(np.mean(values))
        return found

    def _measure(self, kinds: Mapping[str, Any], ks: tuple[int, ...], *, linear: bool) -> Results:
        """Of several kinds of features: parameters, or None for raw pixels."""
        functions = {
            kind: _pixels
            if params is None
            else with_sharded_inputs(self._features, self.mesh, params)
            for kind, params in kinds.items()
        }

        def features(images: np.ndarray) -> dict[str, Any]:
            return {kind: function(images) for kind, function in functions.items()}

        bank, bank_labels = extract_features(features, self.bank)
        queries, labels = extract_features(features, self.queries)
        found: Results = {}
        for kind in kinds:
            self.note(f"looking for nearest neighbours{kind}")
            scores = knn_scores(
                bank[kind],
                bank_labels,
                queries[kind],
                labels,
                num_classes=self.num_classes,
                ks=ks,
                temperature=self.temperature,
            )
            found[f"knn_top1{kind}"] = scores[ks[0]].top1
            found |= {f"knn_top1_k{k}{kind}": scores[k].top1 for k in ks[1:]}
        if linear:
            for kind in kinds:
                self.note(f"training a linear probe{kind}")
                train, test = {kind: bank[kind]}, {kind: queries[kind]}
                scores = probe_scores(
                    train, bank_labels, test, labels, num_classes=self.num_classes
                )
                found[f"linear_top1{kind}"] = scores[kind].top1
        return found

    @cached_property  # compiled once in a run
    def _features(self) -> Callable[..., Array]:
        return jax.jit(self.task.features)


def _pixels(images: np.ndarray) -> np.ndarray:
    return np.float32(images).reshape(len(images), -1)


@dataclass(frozen=True)
class Evaluation:
    """The evaluators of one run; results go to its log and into its workdir.

    All processes evaluate together, and have the same results; the main one writes them.
    """

    run_log: MetricsLogger
    workdir: Path
    evaluators: Sequence[Evaluator]
    total_steps: int
    note: Callable[[str], None] = lambda _: None  # is told what is being done

    def hooks(self) -> list[Hook]:
        """One for each evaluator that runs while the run goes on."""
        return [Hook(e.every, self._hook(e)) for e in self.evaluators if e.every]

    def _hook(self, evaluator: Evaluator) -> Callable[[int, TrainState], None]:
        def run(step: int, state: TrainState) -> None:
            if step == self.total_steps:
                return  # the last evaluation comes in any case
            found = _numbers(evaluator.run(step, state))
            if found:
                self.run_log.scalars(step, found)
                text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
                log.info("step %d: %s", step, text)

        return run

    def finish(self, step: int, state: TrainState, more: Mapping[str, Any]) -> None:
        """The last evaluation: summary.json, which takes `more` too, and its table."""
        found: Results = {}
        for evaluator in self.evaluators:
            self.note(f"evaluating: {type(evaluator).__name__}")
            found |= evaluator.finish(step, state)
        if numbers := _numbers(found):
            self.run_log.scalars(step, numbers)
        rates, losses = (self.run_log.column(name) for name in ("images_per_second", "loss"))
        summary = {
            **found,
            "final_loss": losses[-1] if losses else None,
            "images_per_second": float(np.median(rates)) if rates else None,
            "steps": step,
            **more,
        }
        if processes.is_main():
            write_json(self.workdir / "summary.json", summary)
            print_summary(summary)


def _numbers(results: Results) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, float)}


def read_summary(workdir: Path, step: int) -> dict[str, Any] | None:
    """The summary in a workdir, if it is of that step."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("steps") == step else None


def print_summary(summary: Mapping[str, Any]) -> None:
    """A short table of what a run came to."""
    kinds = {
        "": "this encoder",
        "_random_init": f"random encoder (mean of {RANDOM_ENCODERS})",
        "_pixels": "raw pixels",
    }
    names = {"top1": "top-1", "top5": "top-5", "top1_ema": "top-1, averaged parameters"}
    measures = {"knn_top1": "k-NN top-1", "linear_top1": "linear probe top-1"}
    of_k = [name for name in summary if re.fullmatch(r"knn_top1_k\d+", name)]
    measures |= {name: f"k-NN top-1, k = {name.removeprefix('knn_top1_k')}" for name in of_k}
    for measure, label in measures.items():
        names |= {f"{measure}{kind}": f"{label}, {text}" for kind, text in kinds.items()}
    names |= {"final_loss": "final loss", "images_per_second": "images per second"}
    rows = {label: summary[name] for name, label in names.items() if summary.get(name) is not None}
    if interval := summary.get("top1_interval"):
        rows["95 % interval of top-1"] = f"{interval[0]:.3f} to {interval[1]:.3f}"
        rows["images evaluated"] = summary["eval_images"]
    if "pictures" in summary:
        rows["pictures"] = summary["pictures"]
    steps = summary["steps"]
    print_summary_table(f"After {steps} steps" if steps else "Without training", rows)
