"""Predict the classes of images, or of their pixels, with a fine-tuned or probed checkpoint.

mae-jax predict IMAGE_OR_DIR... --checkpoint FINETUNED [--out predictions.csv]
mae-jax predict IMAGE_OR_DIR... --checkpoint SEGMENTATION [--out predictions]
"""

import argparse
import csv
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.sources import FileSource
from mae_jax.evaluate.mask_files import write_masks
from mae_jax.utils import cli
from mae_jax.utils.atomic import atomic_path, check_writable
from mae_jax.utils.errors import UserError

SHOWN = 5  # classes of an image

log = logging.getLogger("mae_jax")

# By problem type of the head: the columns after "file".
COLUMNS = {
    "single_label_classification": ["rank", "class", "name", "probability"],
    "multi_label_classification": [
        *("rank", "class", "name", "probability", "threshold", "positive"),
    ],
    "regression": ["output", "name", "value"],
}


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if arguments.out and arguments.out.suffix:
        cli.check_output("--out", arguments.out, ".csv")
    source = FileSource(arguments.images)
    model, params = convert_cli.load_model(arguments)
    model.check_head()
    problem, count = model.info.problem, model.info.num_classes
    _check_flags(arguments, problem)
    names = _class_names(arguments.class_names, model.info.class_names, count, problem)
    if model.info.segments:
        _segment(arguments, model, params, source, names)
    else:
        _classify(arguments, model, params, source, names)


def _segment(
    arguments: argparse.Namespace,
    model: PretrainedModel,
    params: Params,
    source: FileSource,
    names: tuple[str, ...],
) -> None:
    """Write masks and overlays, and print the most frequent classes of every image."""
    out = arguments.out or Path("predictions")
    if out.suffix or out.is_file():
        raise UserError(
            f"--out {out} must be a folder, not a file or a name with a suffix: "
            f"{arguments.checkpoint} is a "
            "segmentation model, and predicts masks"
        )
    check_writable("--out", out)
    for file, fractions in write_masks(model, params, source, out, names, arguments.batch_size):
        shown = [f"{share:.0%} {name}" for name, share in fractions.items()][:SHOWN]
        print(f"{file}: {', '.join(shown)}")
    print(f"{out}: {cli.pluralize(len(source), 'image')}")


def _classify(
    arguments: argparse.Namespace,
    model: PretrainedModel,
    params: Params,
    source: FileSource,
    names: tuple[str, ...],
) -> None:
    """Write and print the best classes of every image."""
    problem, count = model.info.problem, model.info.num_classes
    out = arguments.out or Path("predictions.csv")
    cli.check_output("--out", out, ".csv")
    if problem == "regression" and not model.info.problem_type:
        log.warning(
            "its one output has no problem_type: a regression, whose value is written; if it is "
            "the logit of a class, its probability is the sigmoid of that"
        )

    @jax.jit
    def predict(params: Any, images: Array) -> dict[str, Array]:
        return {"scores": scores(model.logits(params, images), problem)}

    predictions = convert_cli.map_images(
        model, source, arguments.batch_size, lambda images: predict(params, images)
    )["scores"]
    threshold = 0.5 if arguments.threshold is None else arguments.threshold
    tables = [
        _rows(row, names, problem, arguments.top or _default_top(problem, count), threshold)
        for row in predictions
    ]
    with atomic_path(out) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", *COLUMNS[problem]])
        for number, rows in enumerate(tables):
            table.writerows([source.describe(number), *row] for row in rows)
    for number, rows in enumerate(tables):
        print(source.describe(number))
        for row in rows:
            print(_line(dict(zip(COLUMNS[problem], row)), names))
    print(f"{out}: {cli.pluralize(len(source), 'image')}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = convert_cli.image_parser("mae_jax.predict", __doc__)
    convert_cli.add_batch_size(parser)
    parser.add_argument(
        "--out",
        type=cli.path_argument,
        help="predictions.csv; of a segmentation model a folder of masks (predictions)",
    )
    parser.add_argument(
        "--top",
        type=cli.positive_int,
        help="classes per image (5; all of a multi-label head, and always its positive ones)",
    )
    parser.add_argument(
        "--threshold",
        type=cli.fraction,
        help="probability from which a class of a multi-label head is positive (0.5)",
    )
    parser.add_argument(
        "--class-names",
        type=cli.path_argument,
        help="a file with one name per line, if the checkpoint has none",
    )
    return parser


def _check_flags(arguments: argparse.Namespace, problem: str) -> None:
    """Raise ConvertError for flags that the head has no use for."""
    if arguments.threshold is not None and problem != "multi_label_classification":
        raise ConvertError(f"--threshold is for multi-label heads; this one is for {problem}")
    if arguments.top is not None and problem in ("regression", "semantic_segmentation"):
        raise ConvertError(
            f"--top is for classes; the head of this checkpoint is a {problem.replace('_', ' ')}"
        )


def scores(logits: Float[Array, "b n"], problem: str) -> Float[Array, "b n"]:
    """Return probabilities of classes that exclude each other, or do not, or plain values."""
    if problem == "single_label_classification":
        return jax.nn.softmax(logits)
    return jax.nn.sigmoid(logits) if problem == "multi_label_classification" else logits


def _default_top(problem: str, count: int) -> int:
    return 5 if problem == "single_label_classification" else count


def _rows(
    values: np.ndarray, names: Sequence[str], problem: str, top: int, threshold: float
) -> list[list[Any]]:
    """Return the rows of `COLUMNS` for the scores of one image."""
    if problem == "regression":
        return [[n, names[n], f"{value:.6g}"] for n, value in enumerate(values)]
    if problem == "multi_label_classification":
        top = max(top, int((values >= threshold).sum()))  # an answer is the set of positives
    best = np.argsort(-values, kind="stable")[:top]
    rows = [[n + 1, label, names[label], f"{values[label]:.6f}"] for n, label in enumerate(best)]
    if problem == "multi_label_classification":
        for row, label in zip(rows, best):
            row += [threshold, int(values[label] >= threshold)]
    return rows


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    """Return a row for people; classes of the same name get their number."""
    if "value" in row:
        return f"  {row['value']:>12}  {row['name']}"
    mark = {1: "+ ", 0: "  "}[row["positive"]] if "positive" in row else ""
    number = f" (class {row['class']})" if Counter(names)[row["name"]] > 1 else ""
    return f"  {mark}{float(row['probability']):6.1%}  {row['name']}{number}"


def _class_names(
    path: Path | None, known: tuple[str, ...], count: int, problem: str
) -> tuple[str, ...]:
    """Return the names of the classes: from a file, from the checkpoint, or "class 7"."""
    if path is None:
        kind = "output" if problem == "regression" else "class"
        return known or tuple(f"{kind} {number}" for number in range(count))
    try:
        names = tuple(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"--class-names: {error}") from error
    if len(names) != count:
        raise ConvertError(f"{path} has {len(names)} lines for {count} classes")
    return names


if __name__ == "__main__":
    cli.run_command(main)
