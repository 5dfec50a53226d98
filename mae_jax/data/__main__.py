"""Looks after data sets: are all images good, what is their mean, how would they be faster to read.

python -m mae_jax.data check DIR_OR_TFDS_NAME         which images are bad
python -m mae_jax.data stats DIR_OR_TFDS_NAME         mean and deviation of the channels
python -m mae_jax.data prepare TFDS_NAME              downloads it and prepares it as array_record
python -m mae_jax.data cache DIR_OR_TFDS_NAME DST     a copy with smaller images
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

from mae_jax.data.factory import list_splits, open_any
from mae_jax.data.loader import available_cpus
from mae_jax.data.sources import DERIVED_PREFIX, DataError, Source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.data.validation import ValidationReport, channel_stats, validate_images
from mae_jax.utils import cli, console
from mae_jax.utils.atomic import atomic_path

SHOWN = 20  # bad images at most on the screen


def main(argv: list[str]) -> None:
    parser = cli.make_parser("mae_jax.data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (check_command, stats_command, prepare_command, cache_command):
        name, text = function.__name__.removesuffix("_command"), str(function.__doc__)
        function(commands.add_parser(name, help=text, description=text, allow_abbrev=False))
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


def check_command(parser: argparse.ArgumentParser) -> None:
    """Decodes every image once and lists what is bad; exits with 1 if anything is."""
    _add_data(parser)
    parser.add_argument("--out", type=Path, help="a file for the names of all bad images")

    def run(arguments: argparse.Namespace) -> None:
        if arguments.out:
            cli.check_output("--out", arguments.out, ".txt")
        bad: dict[str, str] = {}
        for split, source in _sources(arguments).items():
            report = validate_images(source, arguments.channels, available_cpus())
            console.print_summary_table(
                f"{arguments.data} {split}".strip(), _described(source, report)
            )
            bad |= report.bad
        for key, reason in list(bad.items())[:SHOWN]:
            print(f"{key}: {reason}")
        if len(bad) > SHOWN:
            print(f"... and {len(bad) - SHOWN} more{'' if arguments.out else ': --out lists all'}")
        if arguments.out:
            with atomic_path(arguments.out) as part:
                part.write_text("".join(f"{key}\t{reason}\n" for key, reason in bad.items()))
            print(f"{arguments.out}: {cli.pluralize(len(bad), 'image')}")
        if bad:
            sys.exit(1)

    parser.set_defaults(run=run)


def stats_command(parser: argparse.ArgumentParser) -> None:
    """Computes the mean and the standard deviation of every channel, for the config."""
    _add_data(parser, "train, or all of a folder without splits")
    parser.add_argument(
        "--images", type=cli.positive_int, help="so many, evenly spaced; all unless given"
    )

    def run(arguments: argparse.Namespace) -> None:
        if arguments.split is None and list_splits(arguments.data, arguments.data_dir) != [""]:
            arguments.split = "train"
        (source,) = _sources(arguments).values()
        if arguments.images:
            source = evenly_spaced(source, arguments.images)
        found = channel_stats(source, arguments.channels, available_cpus())
        rows = [
            (channel, f"{mean:.6g}", f"{std:.6g}")
            for channel, (mean, std) in enumerate(zip(found.mean, found.std))
        ]
        console.print_table(f"{len(source)} images", ("channel", "mean", "deviation"), rows)
        for name, values in vars(found).items():
            print(f"--config.data.{name}='({', '.join(f'{value:.6g}' for value in values)},)'")

    parser.set_defaults(run=run)


def prepare_command(parser: argparse.ArgumentParser) -> None:
    """Downloads a TFDS data set and prepares it as array_record; some need TensorFlow for it."""
    parser.add_argument("name", help="of a TFDS data set, as in cifar10 or eurosat/all")
    parser.add_argument("--data-dir", help="where to; TFDS's own folder unless given")

    def run(arguments: argparse.Namespace) -> None:
        from mae_jax.data.tfds import prepare

        builder = prepare(arguments.name, arguments.data_dir)
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        console.print_summary_table(str(builder.data_dir), counts)
        _say_use(arguments.name, arguments.data_dir)

    parser.set_defaults(run=run)


def cache_command(parser: argparse.ArgumentParser) -> None:
    """Writes a copy with smaller images: faster to read, but other data than the original."""
    _add_data(parser)
    parser.add_argument("dst", type=Path, help="folder for the copy, a TFDS data set")
    parser.add_argument("--short-side", type=cli.positive_int, default=320, help="pixels (320)")
    parser.add_argument("--quality", type=cli.positive_int, default=90, help="of JPEG (90)")
    parser.add_argument("--name", help="of the copy (the original's, and the short side)")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad images out")

    def run(arguments: argparse.Namespace) -> None:
        from mae_jax.data.downscale import DownscaledDataset, DownscaleJpeg, write_dataset

        if arguments.channels not in (1, 3):
            raise DataError("cache writes JPEGs, which are of 1 or 3 channels")
        if arguments.quality > 100:
            raise DataError(f"--quality {arguments.quality} is not from 1 to 100")
        original = Path(arguments.data).absolute().name if _is_path(arguments) else arguments.data
        name = arguments.name or f"{original}_{arguments.short_side}"
        name = re.sub(r"\W+", "_", name).lower().strip("_")
        builder = write_dataset(
            DownscaledDataset(
                name,
                arguments.dst,
                {split or "train": source for split, source in _sources(arguments).items()},
                DownscaleJpeg(arguments.channels, arguments.short_side, arguments.quality),
                threads=available_cpus(),
                skip=arguments.skip_bad,
            )
        )
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        console.print_summary_table(str(builder.data_dir), counts)
        print(f"{DERIVED_PREFIX}a run on it is not one on {arguments.data}.")
        _say_use(name, arguments.dst)

    parser.set_defaults(run=run)


def _add_data(parser: argparse.ArgumentParser, split: str = "all there are") -> None:
    parser.add_argument("data", help="a folder, or the name of a TFDS data set")
    parser.add_argument("--data-dir", help="where TFDS data sets are; TFDS's own unless given")
    parser.add_argument("--split", help=f"of the data ({split})")
    parser.add_argument("--channels", type=cli.positive_int, default=3, help="of images (3)")
    parser.add_argument("--image-feature", default="image", help="of a TFDS data set (image)")


def _sources(arguments: argparse.Namespace) -> dict[str, Source]:
    """The split asked for, or all, by name; "" where a folder has none."""
    splits = [arguments.split]
    if arguments.split is None:
        splits = list_splits(arguments.data, arguments.data_dir)
    found: dict[str, Source] = {}
    for split in splits:
        # The classes of the first split are those of all.
        classes = next(iter(found.values())).classes if found else ()
        found[split] = open_any(
            arguments.data, arguments.data_dir, split, classes, image=arguments.image_feature
        )
    return found


def _is_path(arguments: argparse.Namespace) -> bool:
    return Path(arguments.data).is_dir()


def _described(source: Source, report: ValidationReport) -> dict[str, object]:
    """What a person wants to know of a split, by name."""
    rows: dict[str, object] = {"images": f"{len(report):,}", "bad": f"{len(report.bad):,}"}
    if source.classes:
        counts = [report.classes[number] for number in range(len(source.classes))]
        rows["classes"] = f"{len(counts)}, of {min(counts)} to {max(counts)} good images"
        if others := report.classes.total() - sum(counts):
            rows["labels that are no class"] = others
    if report.sizes:
        sizes = np.array(report.sizes)
        low, middle, high = (
            "{} x {}".format(*np.percentile(sizes, q, axis=0, method="nearest"))
            for q in (0, 50, 100)
        )
        rows["height x width"] = f"{low} to {high}, median {middle}"
        rows["values"] = ", ".join(f"{kind} in {count:,}" for kind, count in report.types.items())
    scan = getattr(source, "scan", None)
    if scan and scan.others:
        rows["other files, ignored"] = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in scan.others.most_common(5)
        )
    if scan and scan.dangling:
        rows["links to nowhere, ignored"] = len(scan.dangling)
    return rows


def _say_use(name: str, folder: str | Path | None) -> None:
    path = f" --config.data.path={folder}" if folder else ""
    print(f"To train on it: --config.data.source=tfds --config.data.name={name}{path}")


if __name__ == "__main__":
    cli.run_command(main)
