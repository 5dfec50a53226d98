"""What a run is judged by: evaluators while it trains, and a summary at its end."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Key

from mae_jax.data.loader import eval_batches
from mae_jax.data.sources import Source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.distributed import processes, sharding
from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.evaluate.figures import ReconstructionFigure, check_display_channels, save_png
from mae_jax.evaluate.knn import knn_scores
from mae_jax.evaluate.metrics import Score, accuracy, top_k
from mae_jax.evaluate.probe import probe_scores
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState
from mae_jax.train.build_data import make_eval_batches, make_eval_transform
from mae_jax.train.build_model import RunLength
from mae_jax.train.config import Config
from mae_jax.train.loop import Hook
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.train.report import RANDOM_ENCODERS, print_summary
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax.run")

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
    writer: MetricsWriter
    folder: Path
    every: int | None

    def run(self, step: int, state: TrainState) -> Results:
        """Writes a picture, which all processes compute."""
        made = self.pictures.reconstruct(state.params)
        if not processes.is_main():
            return {}
        picture = self.pictures.render(made)
        path = self.folder / f"step_{step:07d}.png"
        save_png(path, picture)
        self.writer.write_image(step, "reconstruction", picture)
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
    heartbeat: Callable[[str], None] = lambda _: None

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
            self.heartbeat(f"looking for nearest neighbours{kind}")
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
                self.heartbeat(f"training a linear probe{kind}")
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

    writer: MetricsWriter
    workdir: Path
    evaluators: Sequence[Evaluator]
    total_steps: int
    heartbeat: Callable[[str], None] = lambda _: None

    def hooks(self) -> list[Hook]:
        """One for each evaluator that runs while the run goes on."""
        return [Hook(e.every, self._hook(e)) for e in self.evaluators if e.every]

    def _hook(self, evaluator: Evaluator) -> Callable[[int, TrainState], None]:
        def run(step: int, state: TrainState) -> None:
            if step == self.total_steps:
                return  # the last evaluation comes in any case
            found = _numbers(evaluator.run(step, state))
            if found:
                self.writer.write_scalars(step, found)
                text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
                log.info("step %d: %s", step, text)

        return run

    def evaluate_final(self, step: int, state: TrainState, more: Mapping[str, Any]) -> None:
        """The last evaluation: summary.json, which takes `more` too, and its table."""
        found: Results = {}
        for evaluator in self.evaluators:
            self.heartbeat(f"evaluating: {type(evaluator).__name__}")
            found |= evaluator.finish(step, state)
        if numbers := _numbers(found):
            self.writer.write_scalars(step, numbers)
        rates, losses = (self.writer.history(name) for name in ("images_per_second", "loss"))
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


def make_evaluators(
    config: Config,
    task: Pretrain | Classify,
    *,
    train_source: Source,
    eval_source: Source | None,
    length: RunLength,
    mesh: jax.sharding.Mesh,
    writer: MetricsWriter,
    workdir: Path,
    init_key: Key[Array, ""],
    heartbeat: Callable[[str], None],
) -> list[Evaluator]:
    """The evaluators of a run, none of which has to know what the run trains.

    `heartbeat` is called for every batch.
    """
    evaluators: list[Evaluator] = []
    alone = length.total_steps == 0  # without a training loop, which has a progress bar
    images = partial(make_eval_batches, config, mesh=mesh, show=alone, heartbeat=heartbeat)
    every = {
        "accuracy": length.steps(config.eval.accuracy_every_epochs),
        "knn": length.steps(config.eval.knn_every_epochs),
        "pictures": length.steps(config.eval.pictures_every_epochs),
    }
    if isinstance(task, Pretrain):
        pictures = _make_pictures(config, task, eval_source or train_source)
        folder = workdir / "pictures"
        evaluators.append(ReconstructionEvaluator(pictures, writer, folder, every["pictures"]))
    elif task.model.num_classes and eval_source is not None:
        read = images(eval_source, num_classes=task.model.num_classes)
        evaluators.append(AccuracyEvaluator(task, read, mesh, every["accuracy"]))
    if features_enabled(config, train_source, eval_source):
        assert eval_source is not None
        classes = len(train_source.classes)
        bank = evenly_spaced(train_source, config.eval.knn_bank)
        queries = evenly_spaced(eval_source, config.eval.knn_queries)
        evaluators.append(
            FeatureEvaluator(
                task=task,
                bank=images(bank, num_classes=classes),
                queries=images(queries, num_classes=classes),
                num_classes=classes,
                ks=tuple(config.eval.knn_k),
                temperature=config.eval.knn_temperature,
                mesh=mesh,
                every=every["knn"],
                linear=config.eval.linear,
                baseline_key=init_key if config.eval.baselines else None,
                heartbeat=heartbeat,
            )
        )
    return evaluators


def features_enabled(config: Config, train_source: Source, eval_source: Source | None) -> bool:
    """Whether k-NN is asked for, and has labels and images to measure it on."""
    wanted = config.eval.knn_every_epochs >= 0
    labelled = bool(train_source.classes and eval_source is not None and eval_source.classes)
    return wanted and labelled


def _make_pictures(config: Config, task: Pretrain, source: Source) -> ReconstructionFigure:
    # Pictures show the same images under the same masks over the whole run.
    source = evenly_spaced(source, config.eval.pictures)
    skip, max_bad = config.data.on_bad == "skip", config.data.max_bad
    transform = make_eval_transform(config)
    batches = eval_batches(source, transform, len(source), skip=skip, max_bad=max_bad)
    batch = next(iter(batches))
    mask = task.sample_mask(jax.random.key(0), len(source))
    show = check_display_channels(config.eval.show_channels, config.model.channels)
    return ReconstructionFigure(task, np.asarray(batch["image"]), mask, config.eval.stats, show)
