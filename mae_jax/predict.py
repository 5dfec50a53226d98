"""Predict the classes of images with a fine-tuned or probed checkpoint.

python -m mae_jax.predict IMAGE_OR_DIR... --checkpoint FINETUNED [--out predictions.csv]
"""

import csv
from pathlib import Path

import jax
import numpy as np

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import FileSource
from mae_jax.utils import cli
from mae_jax.utils.atomic import atomic_path


def main(argv: list[str]) -> None:
    parser = convert_cli.image_parser("mae_jax.predict", __doc__)
    convert_cli.add_batch_size(parser)
    parser.add_argument(
        "--out", type=cli.path_argument, default=Path("predictions.csv"), help="predictions.csv"
    )
    parser.add_argument(
        "--top",
        type=cli.positive_int,
        default=5,
        help="classes per image at most (5)",
    )
    parser.add_argument(
        "--class-names",
        type=cli.path_argument,
        help="a file with one name per line, if the checkpoint has none",
    )
    arguments = parser.parse_args(argv)
    cli.check_output("--out", arguments.out, ".csv")
    source = FileSource(arguments.images)
    model, params = convert_cli.load_model(arguments)
    model.check_head()
    names = _class_names(arguments.class_names, model.info.class_names, model.info.num_classes)

    @jax.jit
    def classify(params, images):
        return {"probability": jax.nn.softmax(model.logits(params, images))}

    predictions = convert_cli.map_images(
        model, source, arguments.batch_size, lambda images: classify(params, images)
    )
    probability = predictions["probability"]
    best = np.argsort(-probability, axis=1, kind="stable")[:, : arguments.top]

    with atomic_path(arguments.out) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "rank", "class", "name", "probability"])
        for number, row in enumerate(best):
            for rank, label in enumerate(row):
                text = f"{probability[number, label]:.6f}"
                table.writerow([source.describe(number), rank + 1, label, names[label], text])
    for number, row in enumerate(best):
        print(source.describe(number))
        for label in row:
            print(f"  {probability[number, label]:6.1%}  {names[label]}")
    print(f"{arguments.out}: {cli.pluralize(len(source), 'image')}")


def _class_names(path: Path | None, known: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return the names of the classes: from a file, from the checkpoint, or "class 7"."""
    if path is None:
        return known or tuple(f"class {number}" for number in range(count))
    try:
        names = tuple(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"--class-names: {error}") from error
    if len(names) != count:
        raise ConvertError(f"{path} has {len(names)} lines for {count} classes")
    return names


if __name__ == "__main__":
    cli.run_command(main, convert_cli.FLAGS)
