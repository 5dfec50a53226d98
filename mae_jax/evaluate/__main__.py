"""Evaluate the features of a checkpoint on a dataset: k-NN, linear and other probes.

mae-jax evaluate --checkpoint ANY --data DIR_OR_TFDS_NAME [--suite knn,linear,...]
"""

import argparse
import logging
import time
from collections.abc import Sequence

import jax
from jaxtyping import Array

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.factory import detect_dataset, has_split, is_path
from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import evenly_spaced, sample_shots
from mae_jax.distributed import sharding
from mae_jax.distributed.inference import EvalBatches, with_sharded_inputs
from mae_jax.evaluate import segmentation_command
from mae_jax.evaluate.metrics import top_k
from mae_jax.evaluate.probe import ProbeRecipe
from mae_jax.evaluate.rankme import MAX_IMAGES
from mae_jax.evaluate.results import make_report, print_results
from mae_jax.evaluate.suite import (
    SUITE,
    SplitFeatures,
    SuiteOptions,
    extract_splits,
    measure,
)
from mae_jax.utils import cli
from mae_jax.utils.atomic import write_json
from mae_jax.utils.errors import UserError
from mae_jax.utils.remote import any_path

log = logging.getLogger("mae_jax")


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    measures = _parse_suite(arguments.suite)
    if arguments.out:
        cli.check_output("--out", arguments.out, ".json")
    if set(measures) & set(segmentation_command.SUITE):
        segmentation_command.run(arguments, measures)
        return
    begin = time.perf_counter()
    train, test = _open_splits(arguments, measures)
    model, params = convert_cli.load_model(arguments)
    if "head" in measures:
        assert test is not None
        _check_head(model, test.classes)
    _check_memory(model, measures, len(train or ()) + len(test or ()), arguments.max_gb)

    splits = _extract(model, params, measures, train, test, arguments.batch_size)
    seconds = time.perf_counter() - begin
    log.info("extracted the features of all images in %.1f s", seconds)
    recipe = ProbeRecipe(
        epochs=arguments.epochs or ProbeRecipe.epochs,
        learning_rate=arguments.learning_rate or ProbeRecipe.learning_rate,
        seed=arguments.seed,
    )
    classes = test.classes if test else ()
    options = SuiteOptions(recipe, model.info.heads, arguments.shots, classes)
    results = [result for name in measures for result in measure(name, splits, options)]
    print_results(results, f"{arguments.checkpoint} on {arguments.data}")
    if arguments.out:
        report = make_report(arguments, splits, results)
        report |= {"features_seconds": round(seconds, 2)}
        write_json(arguments.out, report | {"seconds": round(time.perf_counter() - begin, 2)})
        print(arguments.out)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.evaluate", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    descriptions = [f"  {name:14} {text}" for name, text in _DESCRIPTIONS.items()]
    parser.epilog = "suites:\n" + "\n".join(descriptions)
    convert_cli.add_checkpoint(parser)
    parser.add_argument(
        "--data",
        type=cli.dataset_text,
        required=True,
        help="a folder with labeled splits (folders or .npz), or the name of a TFDS dataset; for "
        "rankme alone any folder of images",
    )
    parser.add_argument(
        "--data-dir", type=cli.path_text, help="folder of TFDS datasets (TFDS's default)"
    )
    parser.add_argument(
        "--image-feature", default="image", help="image feature of a TFDS dataset (image)"
    )
    parser.add_argument("--train-split", default="train", help="split to train on (train)")
    parser.add_argument(
        "--eval-split", default="validation", help="split to evaluate on (validation)"
    )
    parser.add_argument("--suite", default="knn,linear", help="any of these (knn,linear)")
    parser.add_argument("--out", type=cli.path_argument, help="write the results as .json")
    parser.add_argument(
        "--train-images",
        type=cli.positive_int,
        help="maximum number of training images, evenly spaced (all)",
    )
    parser.add_argument("--batch-size", type=cli.positive_int, default=256, help="images (256)")
    parser.add_argument(
        "--epochs", type=cli.positive_float, help="of probes (90; 60 of segment_linear)"
    )
    parser.add_argument(
        "--learning-rate",
        type=cli.positive_float,
        help="peak of probes (6.4, the paper's, by LARS; 0.003 of segment_linear, by AdamW)",
    )
    parser.add_argument(
        "--shots", type=cli.positive_int, default=10, help="images per class for few_shot (10)"
    )
    parser.add_argument("--seed", type=cli.uint32, default=0, help="of probes (0)")
    parser.add_argument(
        "--max-gb", type=cli.positive_float, default=16.0, help="of features in memory (16)"
    )
    segmentation_command.add_flags(parser)
    return parser


_DESCRIPTIONS = {
    name: item.description for name, item in SUITE.items()
} | segmentation_command.SUITE


def _parse_suite(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in _DESCRIPTIONS:
            raise UserError(
                f"--suite: there is no {name!r}; use some of {', '.join(_DESCRIPTIONS)}"
            )
    return names


def _open_splits(
    arguments: argparse.Namespace, measures: Sequence[str]
) -> tuple[Source | None, Source | None]:
    """Return the images to train on, and to evaluate on; None for those that nothing needs."""
    if measures == ["head"]:
        return None, _open_labeled(arguments, arguments.eval_split)
    if measures == ["rankme"]:
        train = _open_unlabeled(arguments)
        return evenly_spaced(train, arguments.train_images or MAX_IMAGES), None
    train = _open_labeled(arguments, arguments.train_split)
    test = _open_labeled(arguments, arguments.eval_split, train.classes)
    if arguments.train_images:
        train = evenly_spaced(train, arguments.train_images)
    if "few_shot" in measures:  # fail before the features are extracted
        sample_shots(train.label, len(train), train.classes, arguments.shots, seed=0)
    return train, test


def _open_unlabeled(arguments: argparse.Namespace) -> Source:
    """Open the training split; all images of a folder without splits."""
    data = arguments.data
    if is_path(data) and detect_dataset(data, None).splits() == [""]:
        return detect_dataset(data, None).open("")
    return _open_split(arguments, arguments.train_split)


def _open_split(arguments: argparse.Namespace, split: str, classes: tuple[str, ...] = ()) -> Source:
    """Open a split; raise DataError if it does not exist."""
    data = arguments.data
    if is_path(data) and not has_split(data, split):
        raise DataError(
            f"{any_path(data) / split} does not exist: --data is a folder with one folder, or "
            ".npz, per split, named by --train-split and --eval-split, and in each one folder per "
            "class; --suite rankme needs neither labels nor splits"
        )
    dataset = detect_dataset(data, arguments.data_dir, arguments.image_feature)
    return dataset.open(split, classes)


def _open_labeled(
    arguments: argparse.Namespace, split: str, classes: tuple[str, ...] = ()
) -> Source:
    """Open a labeled split; raise DataError if it does not exist or has no labels."""
    source = _open_split(arguments, split, classes)
    if not source.classes:
        raise DataError(
            f"{arguments.data}/{split} has no class labels: evaluation needs one folder per class, "
            "or a TFDS dataset with a ClassLabel called 'label'; --suite rankme needs no labels"
        )
    return source


def _check_head(model: PretrainedModel, classes: tuple[str, ...]) -> None:
    """Raise UserError unless the model has a head for as many classes as the dataset."""
    model.check_head()
    if model.info.problem != "single_label_classification":
        raise UserError(
            f"the head of {model.path} predicts {model.info.problem}, which has no accuracy: "
            "leave head out of --suite"
        )
    num_classes, names = model.info.num_classes, model.info.class_names
    if num_classes != len(classes):
        raise UserError(
            f"the head of {model.path} has {num_classes} classes, the dataset {len(classes)}"
        )
    if names and names != classes:
        log.warning(
            "the class names of the head (%s, ...) differ from those of the dataset (%s, ...): its "
            "accuracy is meaningful only if both are in the same order",
            names[0],
            classes[0],
        )


def _layers(model: PretrainedModel, measures: Sequence[str]) -> tuple[int, ...]:
    return tuple(range(1, model.info.depth + 1)) if "layers" in measures else ()


def _check_memory(
    model: PretrainedModel, measures: Sequence[str], num_images: int, max_gb: float
) -> None:
    """Raise UserError if the features would not fit into memory."""
    rows, columns = model.info.grid
    vectors = (
        2
        + (model.info.class_tokens > 1)
        + 2 * len(_layers(model, measures))
        + rows * columns * ("attentive" in measures)
    )
    required = num_images * vectors * model.info.width * 4 / 1e9
    if required > max_gb:
        raise UserError(
            f"the features take {required:.1f} GB ({vectors} vectors of {model.info.width} for "
            f"each of {num_images} images): allow them with --max-gb, use fewer images with "
            "--train-images, omit layers or attentive from --suite, or train a probe with "
            "configs/attentive.py"
        )


def _extract(
    model: PretrainedModel,
    params: Params,
    measures: Sequence[str],
    train: Source | None,
    test: Source | None,
    batch_size: int,
) -> SplitFeatures:
    """Return all features that the measures need; every image is read once."""
    layers = _layers(model, measures)

    @jax.jit
    def features_fn(params: Params, images: Array) -> dict[str, Array]:
        features = {}
        if measures != ["head"]:
            pooled = model.features(params, images, layers=layers)
            # Measures take one vector per image and layer: all class tokens would fill the memory.
            features = {name: x for name, x in pooled.items() if "class_tokens" not in name}
        if "attentive" in measures:
            tokens = model.outputs(params, images).tokens
            features["patches"] = tokens[:, model.info.class_tokens :].astype("float32")
        if "head" in measures:
            features["ranking"] = top_k(model.logits(params, images))
        return features

    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    size, num_classes = sharding.round_up_batch(batch_size, mesh), len(test.classes if test else ())

    def batches(source: Source) -> EvalBatches:
        read = lambda: model.batches(source, size, num_classes=num_classes or None)
        return EvalBatches(len(source), read)

    splits = extract_splits(
        with_sharded_inputs(features_fn, mesh, params),
        batches(train) if train else None,
        batches(test) if test else None,
        num_classes,
        show_progress=True,
        report=log.info,
    )
    for split in (splits.train, splits.test):
        convert_cli.warn_nonfinite(split.features if split else {})
    return splits


if __name__ == "__main__":
    cli.run_command(main)
