"""Measures what a checkpoint's features are worth on a data set: k-NN, linear and other probes.

python -m mae_jax.evaluate --checkpoint ANY --data DIR_OR_TFDS_NAME [--suite knn,linear,...]
"""

import argparse
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

import mae_jax
from mae_jax import command_line, console, sharding
from mae_jax.convert.info import ConvertError
from mae_jax.data.loader import Batch, ordered_batches
from mae_jax.data.sources import DataError, Source, make_source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.evals.accuracy import ranked
from mae_jax.evals.extract import extract
from mae_jax.evals.knn import knn_scores
from mae_jax.evals.probe import ProbeRecipe, probe_scores
from mae_jax.evals.scores import Score, score_of
from mae_jax.evaluation import over_devices
from mae_jax.metrics import write_json
from mae_jax.pretrained import Params, Pretrained

log = logging.getLogger("mae_jax")

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
class Row:
    """One line of the table; spread is a standard deviation where a row is a mean."""

    measure: str
    features: str
    top1: float
    top5: float
    images: int
    interval: tuple[float, float]
    seconds: float
    spread: float | None = None


@dataclass(frozen=True)
class Sets:
    """Features by name, and labels, of the training and of the evaluation images."""

    train: dict[str, np.ndarray]
    train_labels: np.ndarray
    test: dict[str, np.ndarray]
    test_labels: np.ndarray
    num_classes: int
    heads: int

    def some(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The training and evaluation features of these names."""
        names = list(names)
        return {name: self.train[name] for name in names}, {name: self.test[name] for name in names}


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    suite = _suite(arguments.suite)
    if arguments.out:
        command_line.check_output("--out", arguments.out, ".json")
    begin = time.perf_counter()
    train, test = _sources(arguments)
    model, params = command_line.load_model(arguments)
    if "head" in suite:
        _check_head(model, test)
    _check_memory(model, suite, len(train), len(test), arguments.max_gb)
    sets, seconds = _extract(model, params, suite, train, test, arguments.batch_size)
    log.info("features of %d images took %.1f s", len(train) + len(test), seconds)
    recipe = ProbeRecipe(
        epochs=arguments.epochs,
        warmup_epochs=arguments.epochs / 9,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    rows = [row for name in suite for row in _measure(name, sets, recipe, arguments.shots)]
    _print(rows, arguments, len(train), len(test))
    if arguments.out:
        report = {
            "checkpoint": arguments.checkpoint,
            "data": arguments.data,
            "train_split": arguments.train_split,
            "eval_split": arguments.eval_split,
            "train_images": len(train),
            "eval_images": len(test),
            "classes": sets.num_classes,
            "features_seconds": round(seconds, 2),
            "seconds": round(time.perf_counter() - begin, 2),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "versions": {"mae_jax": mae_jax.__version__, "jax": jax.__version__},
            "results": [asdict(row) for row in rows],
        }
        write_json(arguments.out, report)
        print(arguments.out)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = command_line.make_parser("mae_jax.evaluate", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:10} {text}" for name, text in SUITE.items())
    command_line.add_checkpoint(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with labelled splits, or the name of a TFDS data set",
    )
    parser.add_argument("--data-dir", help="where TFDS data sets are; TFDS's own unless given")
    parser.add_argument("--train-split", default="train", help="to learn from (train)")
    parser.add_argument("--eval-split", default="validation", help="to judge on (validation)")
    parser.add_argument("--suite", default="knn,linear", help="any of these (knn,linear)")
    parser.add_argument("--out", type=Path, help="the results as .json")
    parser.add_argument(
        "--train-images",
        type=command_line.count,
        help="at most so many to learn from, evenly spaced",
    )
    parser.add_argument("--batch-size", type=command_line.count, default=256, help="images (256)")
    parser.add_argument("--epochs", type=command_line.positive, default=90.0, help="of probes (90)")
    parser.add_argument(
        "--learning-rate",
        type=command_line.positive,
        default=ProbeRecipe.learning_rate,
        help="of probes, the peak (6.4, the paper's)",
    )
    parser.add_argument("--shots", type=command_line.count, default=10, help="of few_shot (10)")
    parser.add_argument("--seed", type=command_line.seed, default=0, help="of probes")
    parser.add_argument(
        "--max-gb", type=command_line.positive, default=16.0, help="of features in memory (16)"
    )
    return parser.parse_args(argv)


def _suite(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SUITE:
            raise ConvertError(f"--suite: there is no {name!r}; use some of {', '.join(SUITE)}")
    return names


def _sources(arguments: argparse.Namespace) -> tuple[Source, Source]:
    """Labelled training and evaluation images; for TFDS --data is a name, else a folder."""
    folder = Path(arguments.data).is_dir()
    if not folder and (Path(arguments.data).exists() or "/" in arguments.data):
        raise DataError(f"--data {arguments.data} is not a directory")
    kind, path = ("folder", arguments.data) if folder else ("tfds", arguments.data_dir)
    for split in (arguments.train_split, arguments.eval_split):
        if folder and not (Path(path) / split).is_dir():
            raise DataError(
                f"{Path(path) / split} does not exist: --data is a folder with a folder for each "
                "split, named by --train-split and --eval-split, and in them one for each class"
            )
    train = make_source(kind, arguments.data, path, arguments.train_split)
    if not train.classes:
        raise DataError(
            f"{arguments.data}/{arguments.train_split} has no class labels: probes and k-NN need "
            "one folder per class, or a TFDS data set with a ClassLabel called 'label'"
        )
    test = make_source(kind, arguments.data, path, arguments.eval_split, train.classes)
    if not test.classes:
        raise DataError(f"{arguments.data}/{arguments.eval_split} has no class labels")
    if arguments.train_images:
        train = evenly_spaced(train, arguments.train_images)
    return train, test


def _check_head(model: Pretrained, test: Source) -> None:
    model.check_head()
    count, names = model.info.num_classes, model.info.class_names
    if count != len(test.classes):
        raise ConvertError(
            f"the head of {model.path} has {count} classes, the data set {len(test.classes)}"
        )
    if names and names != test.classes:
        log.warning(
            "the head's classes are called otherwise than the data set's (%s, ... and %s, ...): "
            "its accuracy counts only if they are in one order",
            names[0],
            test.classes[0],
        )


def _layers(model: Pretrained, suite: list[str]) -> tuple[int, ...]:
    return tuple(range(1, model.info.depth + 1)) if "layers" in suite else ()


def _check_memory(model: Pretrained, suite: list[str], train: int, test: int, most: float) -> None:
    """ConvertError where features would not fit into memory, and what would help."""
    rows, columns = model.info.grid
    vectors = 2 + 2 * len(_layers(model, suite)) + rows * columns * ("attentive" in suite)
    needed = (train + test) * vectors * model.info.width * 4 / 1e9
    if needed > most:
        raise ConvertError(
            f"{vectors} vectors of {model.info.width} for each of {train + test} images are "
            f"{needed:.1f} GB: allow them with --max-gb, take fewer with --train-images, leave "
            "layers or attentive out of --suite, or train a probe with configs/attentive.py"
        )


def _extract(
    model: Pretrained,
    params: Params,
    suite: list[str],
    train: Source,
    test: Source,
    batch_size: int,
) -> tuple[Sets, float]:
    """All features that the suite needs, in one pass over the images, and the seconds it took."""
    layers = _layers(model, suite)

    def features(params: Params, images: Array) -> dict[str, Array]:
        found = model.features(params, images, layers=layers, grid="attentive" in suite)
        if "attentive" in suite:
            grid = found.pop("grid")
            found["patches"] = grid.reshape(len(images), -1, grid.shape[-1])
            found = {name: x for name, x in found.items() if not name.startswith("grid_")}
        if "head" in suite:
            found["ranking"] = ranked(model.logits(params, images))
        return found

    mesh = sharding.make_mesh()
    function = over_devices(features, mesh, params)
    # The last batch is filled up, so every batch splits over the devices.
    batch_size = int(np.ceil(batch_size / mesh.size)) * mesh.size

    def all_of(source: Source) -> tuple[dict[str, np.ndarray], np.ndarray]:
        batches: Iterable[Batch] = ordered_batches(
            source,
            model.transform,
            batch_size,
            advice="Mend it, or leave it out",
            num_classes=len(train.classes),
        )
        bar = console.progress(batches, len(source), lambda batch: int(batch["valid"].sum()))
        return extract(function, bar, len(source))

    begin = time.perf_counter()
    sets = Sets(*all_of(train), *all_of(test), len(train.classes), model.info.heads)
    return sets, time.perf_counter() - begin


def _measure(name: str, sets: Sets, recipe: ProbeRecipe, shots: int) -> list[Row]:
    begin = time.perf_counter()
    if name == "knn":
        scores = {
            (f"k-NN, k = {k}", pool): score
            for pool in ("mean", "cls")
            for k, score in _knn(sets, pool).items()
        }
    elif name == "head":
        scores = {("its own head", ""): score_of(sets.test["ranking"], sets.test_labels)}
    elif name == "few_shot":
        return _few_shot(sets, recipe, shots)
    else:
        kinds = {
            "linear": ["cls", "mean"],
            "attentive": ["patches"],
            "layers": [n for n in sets.train if n.startswith(("cls_", "mean_"))],
        }
        heads = sets.heads if name == "attentive" else 0
        found = _probe(sets, kinds[name], recipe, np.arange(len(sets.train_labels)), heads)
        label = "attentive probe" if name == "attentive" else "linear probe"
        scores = {(label, features): score for features, score in found.items()}
    seconds = (time.perf_counter() - begin) / len(scores)
    return [_row(*names, score, seconds) for names, score in scores.items()]


def _row(measure: str, features: str, score: Score, seconds: float) -> Row:
    images, interval = score.images, score.interval
    return Row(measure, features, score.top1, score.top5, images, interval, round(seconds, 2))


def _knn(sets: Sets, pool: str) -> dict[int, Score]:
    arrays = sets.train[pool], sets.train_labels, sets.test[pool], sets.test_labels
    return knn_scores(*arrays, num_classes=sets.num_classes, ks=KS)


def _probe(
    sets: Sets, names: list[str], recipe: ProbeRecipe, rows: np.ndarray, heads: int = 0
) -> dict[str, Score]:
    train, test = sets.some(names)
    whole = len(rows) == len(sets.train_labels)
    return probe_scores(
        train if whole else {name: x[rows] for name, x in train.items()},
        sets.train_labels[rows],
        test,
        sets.test_labels,
        num_classes=sets.num_classes,
        attention_heads=heads,
        recipe=recipe,
    )


def _few_shot(sets: Sets, recipe: ProbeRecipe, shots: int) -> list[Row]:
    """Means over training sets drawn with seeds 0, 1, ..., whatever the seed of probes."""
    begin = time.perf_counter()
    names, found = ["cls", "mean"], []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(sets.train_labels))
        of_class = [order[sets.train_labels[order] == c][:shots] for c in range(sets.num_classes)]
        fewest = min(map(len, of_class))
        if fewest < shots:
            raise DataError(f"--shots {shots}, but a class has only {fewest} training images")
        found.append(_probe(sets, names, recipe, np.sort(np.concatenate(of_class))))
    seconds = round((time.perf_counter() - begin) / len(names), 2)
    rows = []
    for name in names:
        scores = [scores[name] for scores in found]
        top1, top5 = (
            float(np.mean([vars(score)[t] for score in scores])) for t in ("top1", "top5")
        )
        score = Score(top1, top5, scores[0].images)
        spread = float(np.std([score.top1 for score in scores], ddof=1))
        measure = f"linear, {shots} shots"
        rows.append(Row(measure, name, top1, top5, score.images, score.interval, seconds, spread))
    return rows


def _print(rows: list[Row], arguments: argparse.Namespace, train: int, test: int) -> None:
    best = max((row.top1 for row in rows if row.features.startswith(("cls_", "mean_"))), default=-1)
    lines = []
    for row in rows:
        low, high = row.interval
        measure = row.measure
        if "_" in row.features and row.top1 == best:
            measure = "best layer"
        spread = f"±{row.spread:.3f}" if row.spread is not None else ""
        lines.append(
            (
                measure,
                row.features,
                f"{row.top1:.3f}{spread}",
                f"{low:.2f}-{high:.2f}",
                f"{row.top5:.3f}",
                f"{row.images}",
                f"{row.seconds:.1f}",
            )
        )
    title = f"{arguments.checkpoint} on {arguments.data}: {train} images to learn from"
    columns = ("measure", "features", "top-1", "95 %", "top-5", "images", "s")
    console.print_rows(title, columns, lines)


if __name__ == "__main__":
    command_line.run(main)
