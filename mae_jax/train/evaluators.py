"""Evaluators that run during and after training."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.distributed import processes
from mae_jax.distributed.inference import (
    EvalBatches,
    extract_features,
    with_sharded_inputs,
)
from mae_jax.evaluate.figures import ReconstructionFigure, save_png
from mae_jax.evaluate.metrics import Score, accuracy, top_k
from mae_jax.evaluate.pca import color_patches
from mae_jax.evaluate.suite import SplitFeatures, extract_splits
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.tasks.train_step import TrainState
from mae_jax.train.loop import Hook
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.train.report import print_summary
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax.run")

Results = dict[str, Any]


class Evaluator(Protocol):
    """Evaluates a train state."""

    @property
    def every(self) -> int | None:
        """Steps between evaluations; None evaluates at the end of the run only."""
        ...

    def run(self, step: int, state: TrainState) -> Results:
        """Return results by name during the run."""
        ...

    def finish(self, step: int, state: TrainState) -> Results:
        """Return results by name at the end of the run."""
        ...


@dataclass(frozen=True)
class ReconstructionEvaluator:
    """Draws reconstructions of the same images under the same masks to pictures/step_*.png.

    Beside them the features of all patches, without masking, as colors: those of one figure are
    comparable, those of two are not.
    """

    pictures: ReconstructionFigure
    writer: MetricsWriter
    folder: Path
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Write a figure; all processes compute it together."""
        reconstructions = self.pictures.reconstruct(state.params)
        features = self.pictures.grid_features(state.params)
        if not processes.is_main():
            return {}
        figure = self.pictures.render(reconstructions, color_patches(features))
        return write_figure(figure, step, "reconstruction", self.writer, self.folder)

    finish = run


def write_figure(
    figure: np.ndarray, step: int, name: str, writer: MetricsWriter, folder: Path
) -> Results:
    """Write a figure of a step to the folder and to the loggers; return its path as "pictures"."""
    path = folder / f"step_{step:07d}.png"
    save_png(path, figure)
    writer.write_image(step, name, figure)
    return {"pictures": str(path)}


@dataclass(frozen=True)
class AccuracyEvaluator:
    """Computes top1 and top5 of the classifier, and of its EMA parameters if there are any."""

    task: Classify
    images: EvalBatches
    mesh: jax.sharding.Mesh
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Return the accuracies on the evaluation split."""
        del step
        return self._evaluate(state, show_progress=False)[0]

    def finish(self, step: int, state: TrainState) -> Results:
        """Return them with the number of images, a confidence interval and the seconds."""
        del step
        begin = time.perf_counter()
        results, score = self._evaluate(state, show_progress=True)
        return results | {
            "top1_interval": list(score.interval),
            "eval_images": score.images,
            "eval_seconds": round(time.perf_counter() - begin, 2),
        }

    def _evaluate(self, state: TrainState, *, show_progress: bool) -> tuple[Results, Score]:
        score = self._score(state.params, state, show_progress)
        results: Results = {"top1": score.top1, "top5": score.top5}
        if state.ema is not None:
            ema = self._score(state.ema, state, show_progress)
            results |= {"top1_ema": ema.top1, "top5_ema": ema.top5}
        return results, score

    def _score(self, params: Any, state: TrainState, show_progress: bool) -> Score:
        function = with_sharded_inputs(self._ranking, self.mesh, params, state.batch_stats)
        outputs = extract_features(function, self.images, show_progress=show_progress)
        return accuracy(outputs.features["ranking"], outputs.labels)

    @cached_property  # compiled once per run
    def _ranking(self) -> Callable[..., dict[str, Array]]:
        def ranking(params: Any, stats: Any, images: Array) -> dict[str, Array]:
            logits = self.task.outputs(params, stats, images).logits
            assert logits is not None
            return {"ranking": top_k(logits)}

        return jax.jit(ranking)


@dataclass(frozen=True)
class FeatureEvaluator:
    """Computes k-NN accuracy and RankMe of the encoder's features; at the end also a linear probe.

    Args:
      bank: training images of k-NN, RankMe and probe.
      queries: evaluation images; None, without labels, computes RankMe alone.
      ks: numbers of neighbors, of which the first is used during training.
      linear: whether to train a linear probe at the end; rankme: whether to compute RankMe.
      baseline_key: PRNG key of a random encoder, whose accuracy is a baseline at the end, like that
        of raw pixels; None computes no baselines.
    """

    task: Pretrain | SupervisedTask
    bank: EvalBatches
    queries: EvalBatches | None
    num_classes: int
    ks: tuple[int, ...]
    temperature: float
    mesh: jax.sharding.Mesh
    every: int | None
    linear: bool = False
    rankme: bool = False
    baseline_key: Key[Array, ""] | None = None
    heartbeat: Callable[[str], None] = lambda _: None

    def run(self, step: int, state: TrainState) -> Results:
        """Return the k-NN accuracy and RankMe of the encoder."""
        del step
        splits = self._extract({"encoder": state.params})
        return self._measure(splits, self.ks[:1], linear=False)

    def finish(self, step: int, state: TrainState) -> Results:
        """Return all measures, of the encoder and of the baselines."""
        del step
        encoders = {"encoder": state.params}
        if self.baseline_key is not None:
            shardings = jax.tree.map(lambda x: x.sharding, state.params)
            init = jax.jit(self.task.init, out_shardings=shardings)
            encoders["random_init"] = init(jax.random.fold_in(self.baseline_key, 1))

        def report(text: str) -> None:
            self.heartbeat(text)
            log.info("evaluating: %s", text)

        with_pixels = len(encoders) > 1 and self.queries is not None
        splits = self._extract(encoders, with_pixels=with_pixels, report=report)
        return self._measure(splits, self.ks, linear=self.linear)

    def _extract(
        self,
        encoders: Mapping[str, Any],
        *,
        with_pixels: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> SplitFeatures:
        """Return the features of all encoders, by name, and raw pixels."""
        functions = {
            name: with_sharded_inputs(self._features, self.mesh, params)
            for name, params in encoders.items()
        }
        if with_pixels:
            functions["pixels"] = self._flatten_pixels
        return extract_splits(
            lambda images: {name: function(images) for name, function in functions.items()},
            self.bank,
            self.queries,
            self.num_classes,
            show_progress=report is not None,
            report=report or self.heartbeat,
        )

    def _measure(self, splits: SplitFeatures, ks: tuple[int, ...], *, linear: bool) -> Results:
        assert splits.train is not None
        suffixes = {name: "" if name == "encoder" else f"_{name}" for name in splits.train.features}
        results: Results = {}
        if self.queries is not None:
            for name, scores in splits.knn(list(suffixes), ks, self.temperature).items():
                results[f"knn_top1{suffixes[name]}"] = scores[ks[0]].top1
                results |= {f"knn_top1_k{k}{suffixes[name]}": scores[k].top1 for k in ks[1:]}
        if self.rankme:
            names = [name for name in suffixes if name != "pixels"]
            ranks = splits.rankme(names)
            results |= {f"rankme{suffixes[name]}": rank for name, rank in ranks.items()}
        if linear and self.queries is not None:
            for name, suffix in suffixes.items():  # one by one: together, rounding would differ
                results[f"linear_top1{suffix}"] = splits.probe([name])[name].top1
        return results

    def _flatten_pixels(self, images: np.ndarray) -> np.ndarray:
        if self.task.nodata:  # as the encoder sees them
            images = np.where(np.isnan(images), np.array(self.task.mean, images.dtype), images)
        return images.reshape(len(images), -1)

    @cached_property  # compiled once per run
    def _features(self) -> Callable[..., Array]:
        return jax.jit(self.task.features)


@dataclass(frozen=True)
class Evaluation:
    """The evaluators of a run, whose results go to its metrics and its workdir.

    All processes evaluate together and have the same results; the main process writes them.
    """

    writer: MetricsWriter
    workdir: Path
    evaluators: Sequence[Evaluator]
    total_steps: int
    heartbeat: Callable[[str], None] = lambda _: None

    def hooks(self) -> list[Hook]:
        """Return a hook for each evaluator that runs during training."""
        return [Hook(e.every, self._hook(e)) for e in self.evaluators if e.every]

    def _hook(self, evaluator: Evaluator) -> Callable[[int, TrainState], None]:
        def run(step: int, state: TrainState) -> None:
            if step == self.total_steps:
                return  # the final evaluation follows
            scalars = _floats(evaluator.run(step, state))
            if scalars:
                self.writer.write_scalars(step, scalars)
                text = ", ".join(f"{name} {value:.3f}" for name, value in scalars.items())
                log.info("step %d: %s", step, text)

        return run

    def evaluate_final(self, step: int, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Run the final evaluation; write summary.json, with `extra`, and print it."""
        results: Results = {}
        for evaluator in self.evaluators:
            self.heartbeat(f"evaluating: {type(evaluator).__name__}")
            results |= evaluator.finish(step, state)
        if scalars := _floats(results):
            self.writer.write_scalars(step, scalars)
        rates, losses = (self.writer.history(name) for name in ("images_per_second", "loss"))
        summary = {
            **results,
            "final_loss": losses[-1] if losses else None,
            "images_per_second": float(np.median(rates)) if rates else None,
            "steps": step,
            **extra,
        }
        if processes.is_main():
            write_json(self.workdir / "summary.json", summary)
            print_summary(summary)


def _floats(results: Results) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, float)}
