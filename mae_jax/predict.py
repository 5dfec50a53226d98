"""Names the classes that a fine-tuned or probed checkpoint sees in images.

python -m mae_jax.predict IMAGE_OR_DIR... --checkpoint FINETUNED [--out predictions.csv]
"""

import csv
from pathlib import Path

import jax
import numpy as np

from mae_jax import command_line
from mae_jax.convert.info import ConvertError
from mae_jax.data.sources import FileSource
from mae_jax.whole import whole

DESCRIPTION = "Names the classes that a fine-tuned or probed checkpoint sees in images."


def main(argv: list[str]) -> None:
    parser = command_line.image_parser("mae_jax.predict", DESCRIPTION)
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), help="predictions.csv")
    parser.add_argument("--top", type=int, default=5, help="classes per image (5)")
    parser.add_argument(
        "--class-names", type=Path, help="a file with a name per line, if the checkpoint has none"
    )
    arguments = parser.parse_args(argv)
    source = FileSource(arguments.images)
    model, params = command_line.load_model(arguments)
    names = _class_names(arguments.class_names, model.info.class_names, model.info.num_classes)
    if not arguments.top >= 1:
        raise ConvertError(f"--top {arguments.top} must be at least 1")

    @jax.jit
    def classify(params, images):
        return {"probability": jax.nn.softmax(model.logits(params, images))}

    batches = command_line.over_images(
        model, source, arguments.batch_size, lambda images: classify(params, images)
    )
    probability = np.concatenate([batch["probability"] for batch in batches])
    best = np.argsort(-probability, axis=1, kind="stable")[:, : arguments.top]

    with whole(arguments.out) as part, part.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "rank", "class", "name", "probability"])
        for number, row in enumerate(best):
            for rank, label in enumerate(row):
                share = f"{probability[number, label]:.6f}"
                table.writerow([source.key(number), rank + 1, label, names[label], share])
    for number, row in enumerate(best):
        print(source.key(number))
        for label in row:
            print(f"  {probability[number, label]:6.1%}  {names[label]}")
    print(f"{arguments.out}: {len(source)} images")


def _class_names(path: Path | None, known: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Names for `count` classes: of the file given, of the checkpoint, else "class 7"."""
    if path is None:
        return known or tuple(f"class {number}" for number in range(count))
    try:
        names = tuple(path.read_text().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"cannot read --class-names {path}: {error}") from error
    if len(names) != count:
        raise ConvertError(f"{path} has {len(names)} lines for {count} classes")
    return names


if __name__ == "__main__":
    command_line.run(main)
