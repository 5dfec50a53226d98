"""Measures what a checkpoint's features are worth on a data set: k-NN, linear and other probes.

python -m mae_jax.evaluate --checkpoint ANY --data DIR_OR_TFDS_NAME [--suite knn,linear,...]
"""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

import mae_jax
from mae_jax.convert import cli as convert_cli
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.batches import Batch
from mae_jax.data.factory import detect_dataset, has_split
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import evenly_spaced, sample_shots
from mae_jax.distributed import sharding
from mae_jax.distributed.inference import EvalBatches, extract_features
from mae_jax.evaluate.metrics import top_k
from mae_jax.evaluate.probe import ProbeRecipe
from mae_jax.evaluate.suite import SUITE, LabeledFeatures, Suite, SuiteResult
from mae_jax.train.evaluators import with_sharded_inputs
from mae_jax.utils import cli, console
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax")


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    names = _suite(arguments.suite)
    if arguments.out:
        cli.check_output("--out", arguments.out, ".json")
    begin = time.perf_counter()
    train, test = _sources(arguments, names)
    model, params = convert_cli.load_model(arguments)
    if "head" in names:
        _check_head(model, test.classes)
    _check_memory(model, names, len(train or ()) + len(test), arguments.max_gb)

    found = _extract(model, params, names, train, test, arguments.batch_size)
    seconds = time.perf_counter() - begin
    log.info("the features of all images took %.1f s", seconds)
    recipe = ProbeRecipe(
        epochs=arguments.epochs, learning_rate=arguments.learning_rate, seed=arguments.seed
    )
    suite = Suite(*found, test.classes, model.info.heads, recipe, arguments.shots)
    rows = [row for name in names for row in suite.measure(name)]
    _print(rows, f"{arguments.checkpoint} on {arguments.data}")
    if arguments.out:
        report = _report(arguments, suite, rows)
        report |= {"features_seconds": round(seconds, 2)}
        write_json(arguments.out, report | {"seconds": round(time.perf_counter() - begin, 2)})
        print(arguments.out)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = cli.make_parser("mae_jax.evaluate", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:10} {text}" for name, text in SUITE.items())
    convert_cli.add_checkpoint(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with labelled splits (folders or .npz), or the name of a TFDS data set",
    )
    parser.add_argument("--data-dir", help="where TFDS data sets are; TFDS's own unless given")
    parser.add_argument("--image-feature", default="image", help="of a TFDS data set (image)")
    parser.add_argument("--train-split", default="train", help="to learn from (train)")
    parser.add_argument("--eval-split", default="validation", help="to judge on (validation)")
    parser.add_argument("--suite", default="knn,linear", help="any of these (knn,linear)")
    parser.add_argument("--out", type=Path, help="the results as .json")
    parser.add_argument(
        "--train-images",
        type=cli.positive_int,
        help="at most so many to learn from, evenly spaced",
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=256, help="images (256)")
    parser.add_argument("--epochs", type=cli.positive_float, default=90.0, help="of probes (90)")
    parser.add_argument(
        "--learning-rate",
        type=cli.positive_float,
        default=ProbeRecipe.learning_rate,
        help="of probes, the peak (6.4, the paper's)",
    )
    parser.add_argument("--shots", type=cli.positive_int, default=10, help="of few_shot (10)")
    parser.add_argument("--seed", type=cli.uint32, default=0, help="of probes")
    parser.add_argument(
        "--max-gb", type=cli.positive_float, default=16.0, help="of features in memory (16)"
    )
    return parser.parse_args(argv)


def _suite(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SUITE:
            raise ConvertError(f"--suite: there is no {name!r}; use some of {', '.join(SUITE)}")
    return names


def _sources(arguments: argparse.Namespace, names: list[str]) -> tuple[Source | None, Source]:
    """Images to learn from, unless there is nothing to learn, and images to judge on."""
    if names == ["head"]:
        return None, _source(arguments, arguments.eval_split)
    train = _source(arguments, arguments.train_split)
    test = _source(arguments, arguments.eval_split, train.classes)
    if arguments.train_images:
        train = evenly_spaced(train, arguments.train_images)
    if "few_shot" in names:  # what cannot be drawn is better known before the features are made
        sample_shots(train.label, len(train), train.classes, arguments.shots, seed=0)
    return train, test


def _source(arguments: argparse.Namespace, split: str, classes: tuple[str, ...] = ()) -> Source:
    """A labelled split."""
    data = arguments.data
    if Path(data).is_dir() and not has_split(Path(data), split):
        raise DataError(
            f"{Path(data) / split} does not exist: --data is a folder with a folder, or .npz, for "
            "each split, named by --train-split and --eval-split, and in them one for each class"
        )
    dataset = detect_dataset(data, arguments.data_dir, arguments.image_feature)
    source = dataset.open(split, classes)
    if not source.classes:
        raise DataError(
            f"{data}/{split} has no class labels: that takes one folder per class, or a TFDS data "
            "set with a ClassLabel called 'label'"
        )
    return source


def _check_head(model: PretrainedModel, classes: tuple[str, ...]) -> None:
    model.check_head()
    count, names = model.info.num_classes, model.info.class_names
    if count != len(classes):
        raise ConvertError(
            f"the head of {model.path} has {count} classes, the data set {len(classes)}"
        )
    if names and names != classes:
        log.warning(
            "the head's classes are called otherwise than the data set's (%s, ... and %s, ...): "
            "its accuracy counts only if they are in one order",
            names[0],
            classes[0],
        )


def _layers(model: PretrainedModel, names: list[str]) -> tuple[int, ...]:
    return tuple(range(1, model.info.depth + 1)) if "layers" in names else ()


def _check_memory(model: PretrainedModel, names: list[str], images: int, most: float) -> None:
    """ConvertError where features would not fit into memory, and what would help."""
    rows, columns = model.info.grid
    vectors = 2 + 2 * len(_layers(model, names)) + rows * columns * ("attentive" in names)
    needed = images * vectors * model.info.width * 4 / 1e9
    if needed > most:
        raise ConvertError(
            f"{vectors} vectors of {model.info.width} for each of {images} images are "
            f"{needed:.1f} GB: allow them with --max-gb, take fewer with --train-images, leave "
            "layers or attentive out of --suite, or train a probe with configs/attentive.py"
        )


def _extract(
    model: PretrainedModel,
    params: Params,
    names: list[str],
    train: Source | None,
    test: Source,
    batch_size: int,
) -> tuple[LabeledFeatures | None, LabeledFeatures]:
    """All features that the suite needs, each image being read once."""
    layers = _layers(model, names)

    @jax.jit
    def features(params: Params, images: Array) -> dict[str, Array]:
        found = {}
        if names != ["head"]:
            found = model.features(params, images, layers=layers)
        if "attentive" in names:
            found["patches"] = model.outputs(params, images).tokens[:, 1:].astype("float32")
        if "head" in names:
            found["ranking"] = top_k(model.logits(params, images))
        return found

    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    function = with_sharded_inputs(features, mesh, params)

    def all_of(source: Source) -> LabeledFeatures:
        def read() -> Iterator[Batch]:
            size = sharding.round_up_batch(batch_size, mesh)
            batches = model.batches(source, size, num_classes=len(test.classes))
            return console.progress(batches, len(source), count=console.num_valid)

        found = LabeledFeatures(*extract_features(function, EvalBatches(len(source), read)))
        convert_cli.warn_nonfinite(found.features)
        return found

    return all_of(train) if train else None, all_of(test)


def _report(arguments: argparse.Namespace, suite: Suite, rows: list[SuiteResult]) -> dict[str, Any]:
    return {
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "train_split": arguments.train_split,
        "eval_split": arguments.eval_split,
        "train_images": len(suite.train.labels) if suite.train else 0,
        "eval_images": len(suite.test.labels),
        "classes": len(suite.classes),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"mae_jax": mae_jax.__version__, "jax": jax.__version__},
        "results": [
            {
                "measure": row.measure,
                "features": row.features,
                **vars(row.score),
                "interval": row.score.interval,
                "spread": row.spread,
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }


def _print(rows: list[SuiteResult], title: str) -> None:
    layers = [row for row in rows if "_" in row.features]
    best = max(layers, key=lambda row: row.score.top1, default=None)
    lines = []
    for row in rows:
        low, high = row.score.interval
        spread = f"±{row.spread:.3f}" if row.spread is not None else ""
        lines.append(
            (
                "best layer" if row is best else row.measure,
                row.features,
                f"{row.score.top1:.3f}{spread}",
                f"{low:.2f}-{high:.2f}",
                f"{row.score.top5:.3f}",
                row.score.images,
                f"{row.seconds:.1f}",
            )
        )
    columns = ("measure", "features", "top-1", "95 %", "top-5", "images", "s")
    console.print_table(title, columns, lines)


if __name__ == "__main__":
    cli.run_command(main, convert_cli.FLAGS)
