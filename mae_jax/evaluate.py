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
from mae_jax import command_line, console, sharding
from mae_jax.convert.info import ConvertError
from mae_jax.data.batches import Batch
from mae_jax.data.opening import has_split, open_named
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import draw_shots, evenly_spaced
from mae_jax.evals.extract import Images, extract
from mae_jax.evals.probe import ProbeRecipe
from mae_jax.evals.scores import ranked
from mae_jax.evals.suite import SUITE, Labelled, Row, Suite
from mae_jax.evaluation import over_devices
from mae_jax.pretrained import Params, Pretrained
from mae_jax.whole import write_json

log = logging.getLogger("mae_jax")


def main(argv: list[str]) -> None:
    arguments = _parse(argv)
    names = _suite(arguments.suite)
    if arguments.out:
        command_line.check_output("--out", arguments.out, ".json")
    begin = time.perf_counter()
    train, test = _sources(arguments, names)
    model, params = command_line.load_model(arguments)
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
    parser = command_line.make_parser("mae_jax.evaluate", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "suites:\n" + "\n".join(f"  {name:10} {text}" for name, text in SUITE.items())
    command_line.add_checkpoint(parser)
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
        draw_shots(train.label, len(train), train.classes, arguments.shots, seed=0)
    return train, test


def _source(arguments: argparse.Namespace, split: str, classes: tuple[str, ...] = ()) -> Source:
    """A labelled split."""
    data = arguments.data
    if Path(data).is_dir() and not has_split(Path(data), split):
        raise DataError(
            f"{Path(data) / split} does not exist: --data is a folder with a folder, or .npz, for "
            "each split, named by --train-split and --eval-split, and in them one for each class"
        )
    source = open_named(data, arguments.data_dir, split, classes, image=arguments.image_feature)
    if not source.classes:
        raise DataError(
            f"{data}/{split} has no class labels: that takes one folder per class, or a TFDS data "
            "set with a ClassLabel called 'label'"
        )
    return source


def _check_head(model: Pretrained, classes: tuple[str, ...]) -> None:
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


def _layers(model: Pretrained, names: list[str]) -> tuple[int, ...]:
    return tuple(range(1, model.info.depth + 1)) if "layers" in names else ()


def _check_memory(model: Pretrained, names: list[str], images: int, most: float) -> None:
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
    model: Pretrained,
    params: Params,
    names: list[str],
    train: Source | None,
    test: Source,
    batch_size: int,
) -> tuple[Labelled | None, Labelled]:
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
            found["ranking"] = ranked(model.logits(params, images))
        return found

    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    function = over_devices(features, mesh, params)

    def all_of(source: Source) -> Labelled:
        def read() -> Iterator[Batch]:
            size = sharding.round_up(batch_size, mesh)
            batches = model.batches(source, size, num_classes=len(test.classes))
            return console.progress(batches, len(source), count=console.valid_images)

        found = Labelled(*extract(function, Images(len(source), read)))
        command_line.warn_of_damage(found.features)
        return found

    return all_of(train) if train else None, all_of(test)


def _report(arguments: argparse.Namespace, suite: Suite, rows: list[Row]) -> dict[str, Any]:
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


def _print(rows: list[Row], title: str) -> None:
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
    console.print_rows(title, columns, lines)


if __name__ == "__main__":
    command_line.run(main)
