"""Check, measure, score, prepare and downscale datasets.

mae-jax data check DIR_OR_TFDS_NAME         list bad images
mae-jax data stats DIR_OR_TFDS_NAME         compute mean and std per channel
mae-jax data score DIR_OR_TFDS_NAME ...     write the losses of images, to sample them by
mae-jax data prepare TFDS_NAME              download and prepare as array_record
mae-jax data cache DIR_OR_TFDS_NAME DST     write a downscaled copy, faster to read
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from mae_jax.data.bit_depth import describe_loss
from mae_jax.data.factory import DatasetSpec, detect_dataset
from mae_jax.data.mask_checks import MaskReport, check_masks
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.segmentation import (
    SegmentationSource,
    has_masks,
    match_folders,
    open_segmentation,
)
from mae_jax.data.sources import DERIVED_PREFIX, DataError, Source
from mae_jax.data.subsets import evenly_spaced
from mae_jax.data.validation import ValidationReport, channel_stats, validate_images
from mae_jax.evaluate.image_scores import score_command
from mae_jax.utils import cli, console
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.cpus import available_cpus

MAX_PRINTED = 20  # bad images printed by `check`


def main(argv: list[str]) -> None:
    """Run the command that `argv` names."""
    arguments = build_parser().parse_args(argv)
    arguments.run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add_arguments in (
        check_command,
        stats_command,
        score_command,
        prepare_command,
        cache_command,
    ):
        name, text = add_arguments.__name__.removesuffix("_command"), str(add_arguments.__doc__)
        add_arguments(commands.add_parser(name, help=text, description=text, allow_abbrev=False))
    return parser


def check_command(parser: argparse.ArgumentParser) -> None:
    """Decode every image once and list the bad ones; exit with 1 if there are any."""
    _add_data(parser)
    _add_read_options(parser)
    parser.add_argument(
        "--out", type=cli.path_argument, help=".txt file for all bad images, with the reason"
    )
    parser.add_argument(
        "--mask-feature",
        help="also check the masks of a TFDS dataset; those of DIR/SPLIT/masks always are",
    )
    parser.add_argument(
        "--ignore", type=int, default=255, help="class number of pixels without label (255)"
    )

    def run(arguments: argparse.Namespace) -> None:
        if arguments.out:
            cli.check_output("--out", arguments.out, ".txt")
        bad: dict[str, str] = {}
        num_classes = 0  # in the masks of the first split
        for split, source in _open_splits(arguments).items():
            masks = _open_masks(arguments, split)
            source = masks[0].images if masks else source
            report = validate_images(
                source,
                arguments.channels,
                available_cpus(),
                arguments.bit_depth,
                _read_options(arguments),
            )
            rows = _summarize(source, report)
            bad |= report.bad
            if masks:
                mask_report = check_masks(
                    masks[0], arguments.channels, available_cpus(), num_classes
                )
                num_classes = num_classes or mask_report.num_classes(arguments.ignore)
                rows |= _summarize_masks(masks[0], mask_report, len(masks[1]))
                bad |= masks[1] | mask_report.bad
            console.print_summary_table(f"{arguments.data} {split}".strip(), rows)
        for name, reason in list(bad.items())[:MAX_PRINTED]:
            print(f"{name}: {reason}")
        if len(bad) > MAX_PRINTED:
            hint = "" if arguments.out else ": --out lists all"
            print(f"... and {len(bad) - MAX_PRINTED} more{hint}")
        if arguments.out:
            with atomic_path(arguments.out) as part:
                part.write_text("".join(f"{name}\t{reason}\n" for name, reason in bad.items()))
            print(f"{arguments.out}: {cli.pluralize(len(bad), 'image')}")
        if bad:
            sys.exit(1)

    parser.set_defaults(run=run)


def stats_command(parser: argparse.ArgumentParser) -> None:
    """Compute mean and standard deviation per channel, and print them as config overrides."""
    _add_data(parser, "train, or everything in a folder without splits")
    _add_read_options(parser)
    parser.add_argument(
        "--images", type=cli.positive_int, help="use this many evenly spaced images (all)"
    )
    parser.add_argument(
        "--ignore-nodata",
        action="store_true",
        help="leave out samples that are GDAL's NoData value of their file, NaN or Inf",
    )

    def run(arguments: argparse.Namespace) -> None:
        if arguments.split is None and _dataset(arguments).splits() != [""]:
            arguments.split = "train"
        (source,) = _open_splits(arguments).values()
        if arguments.images:
            source = evenly_spaced(source, arguments.images)
        stats = channel_stats(
            source,
            arguments.channels,
            available_cpus(),
            arguments.bit_depth,
            _read_options(arguments),
            ignore_nodata=arguments.ignore_nodata,
        )
        rows = [
            (channel, f"{mean:.6g}", f"{std:.6g}")
            for channel, (mean, std) in enumerate(zip(stats.mean, stats.std))
        ]
        console.print_table(f"{len(source)} images", ("channel", "mean", "std"), rows)
        if text := str(stats.nodata):
            ignored = arguments.ignore_nodata or arguments.nodata is not None
            used = "left out" if ignored else "counted; --ignore-nodata omits them"
            print(f"{text}: {used}")
        for name, values in (("mean", stats.mean), ("std", stats.std)):
            print(f"--config.data.{name}='({', '.join(f'{value:.6g}' for value in values)},)'")
        if arguments.bit_depth:
            print(f"--config.data.bit_depth={arguments.bit_depth}")
        for name, text in vars(_read_options(arguments)).items():
            if text is not None:
                print(f"--config.data.{name}={shlex.quote(text)}")

    parser.set_defaults(run=run)


def prepare_command(parser: argparse.ArgumentParser) -> None:
    """Download a TFDS dataset and prepare it as array_record; some datasets need TensorFlow."""
    parser.add_argument("name", help="name of a TFDS dataset, such as cifar10 or eurosat/all")
    parser.add_argument(
        "--data-dir", type=cli.path_text, help="output directory (the default of TFDS)"
    )

    def run(arguments: argparse.Namespace) -> None:
        from mae_jax.data.tfds import prepare

        builder = prepare(arguments.name, arguments.data_dir)
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        console.print_summary_table(str(builder.data_dir), counts)
        _print_training_flags(arguments.name, arguments.data_dir)

    parser.set_defaults(run=run)


def cache_command(parser: argparse.ArgumentParser) -> None:
    """Write a downscaled JPEG copy: faster to read, but no longer the same data."""
    _add_data(parser)
    parser.add_argument(
        "dst", type=cli.path_argument, help="directory for the copy, which is a TFDS dataset"
    )
    parser.add_argument(
        "--short-side", type=cli.positive_int, default=320, help="maximum, in pixels (320)"
    )
    parser.add_argument(
        "--quality", type=cli.positive_int, default=90, help="JPEG quality, 1 to 100 (90)"
    )
    parser.add_argument("--name", help="name of the copy (original name and short side)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out bad images instead of stopping"
    )

    def run(arguments: argparse.Namespace) -> None:
        from mae_jax.data.downscale import DownscaledDataset, DownscaleJpeg, write_dataset

        if arguments.channels not in (1, 3):
            raise DataError(
                f"--channels {arguments.channels} must be 1 or 3, since cache writes JPEG"
            )
        if arguments.quality > 100:
            raise DataError(f"--quality {arguments.quality} must be within 1 to 100")
        is_folder = Path(arguments.data).is_dir()
        if is_folder and arguments.dst.resolve().is_relative_to(Path(arguments.data).resolve()):
            raise DataError(
                f"the copy {arguments.dst} would be among the images of {arguments.data}; choose a "
                "folder outside of it"
            )
        original = Path(arguments.data).absolute().name if is_folder else arguments.data
        name = arguments.name or f"{original}_{arguments.short_side}"
        name = re.sub(r"\W+", "_", name).lower().strip("_")
        builder = write_dataset(
            DownscaledDataset(
                name,
                arguments.dst,
                {split or "train": source for split, source in _open_splits(arguments).items()},
                DownscaleJpeg(
                    arguments.channels,
                    arguments.short_side,
                    arguments.quality,
                    arguments.bit_depth,
                ),
                threads=available_cpus(),
                skip=arguments.skip_bad,
            )
        )
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        console.print_summary_table(str(builder.data_dir), counts)
        print(f"{DERIVED_PREFIX}results on it are not comparable with those on {arguments.data}.")
        _print_training_flags(name, arguments.dst)

    parser.set_defaults(run=run)


def _add_data(parser: argparse.ArgumentParser, default_split: str = "all") -> None:
    parser.add_argument(
        "data", type=cli.dataset_text, help="folder of images, or name of a TFDS dataset"
    )
    parser.add_argument(
        "--data-dir", type=cli.path_text, help="directory of TFDS datasets (the default of TFDS)"
    )
    parser.add_argument("--split", help=f"split to read ({default_split})")
    parser.add_argument(
        "--channels", type=cli.positive_int, default=3, help="channels per image (3)"
    )
    parser.add_argument(
        "--bit-depth",
        type=int,
        choices=range(1, 17),
        metavar="BITS",
        help="that values of 16-bit files use, as data.bit_depth (pictures are read with 8 bits)",
    )
    parser.add_argument(
        "--image-feature", default="image", help="image feature of a TFDS dataset (image)"
    )


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodata",
        metavar="VALUE",
        help="of values without data, as data.nodata: a number, nan or file",
    )
    parser.add_argument(
        "--bands",
        metavar="BAND,BAND,...",
        help="of TIFFs, as data.bands: names, as B04,B03,B02, or numbers from 1 (all)",
    )
    parser.add_argument(
        "--dicom-window",
        metavar="CENTER,WIDTH",
        help="of gray DICOM images, as data.dicom_window: two numbers, or file (their own units)",
    )


def _read_options(arguments: argparse.Namespace) -> ReadOptions:
    options = ReadOptions(arguments.nodata, arguments.bands, arguments.dicom_window)
    if options.bands and len(options.band_list) != arguments.channels:
        raise DataError(
            f"selects {len(options.band_list)} bands, but --channels is {arguments.channels}",
            key="data.bands",
            value=options.bands,
        )
    return options


def _dataset(arguments: argparse.Namespace) -> DatasetSpec:
    return detect_dataset(arguments.data, arguments.data_dir, arguments.image_feature)


def _open_splits(arguments: argparse.Namespace) -> dict[str, Source]:
    """Open the split that --split names, or all; the name is "" in a folder without splits."""
    dataset = _dataset(arguments)
    splits = dataset.splits() if arguments.split is None else [arguments.split]
    sources: dict[str, Source] = {}
    classes: tuple[str, ...] = ()  # of the first split
    for split in splits:
        sources[split] = dataset.open(split, classes)
        classes = classes or sources[split].classes
    return sources


def _open_masks(
    arguments: argparse.Namespace, split: str
) -> tuple[SegmentationSource, dict[str, str]] | None:
    """Return images with masks, and what is wrong with other files; None without masks."""
    data = arguments.data
    if arguments.mask_feature is None and not has_masks(data, split):
        return None
    if (Path(data) / split).is_dir():
        return match_folders(Path(data), split, arguments.ignore)
    source = open_segmentation(
        data,
        split,
        data_dir=arguments.data_dir,
        image_feature=arguments.image_feature,
        mask_feature=arguments.mask_feature or "mask",
        ignore=arguments.ignore,
    )
    return source, {}


def _summarize_masks(
    source: SegmentationSource, report: MaskReport, unmatched: int
) -> dict[str, object]:
    """Return the rows about masks of the table that `check` prints for a split."""
    count = len(source.class_names) or report.num_classes(source.ignore)
    present = sum(report.pixels.get(number, 0) > 0 for number in range(count))
    total = max(sum(report.pixels.values()), 1)
    rows: dict[str, object] = {
        "classes in masks": f"{present} of {count}",
        f"ignored pixels ({source.ignore})": f"{report.pixels.get(source.ignore, 0) / total:.1%}",
    }
    return rows | ({"files without partner": unmatched} if unmatched else {})


def _summarize(source: Source, report: ValidationReport) -> dict[str, object]:
    """Return the rows of the table that `check` prints for a split."""
    rows: dict[str, object] = {"images": f"{len(report):,}", "bad": f"{len(report.bad):,}"}
    if source.classes:
        counts = [report.labels[index] for index in range(len(source.classes))]
        rows["classes"] = f"{len(counts)}, with {min(counts)} to {max(counts)} good images"
        if invalid := report.labels.total() - sum(counts):
            rows["labels out of range"] = invalid
    if report.sizes:
        sizes = np.array(report.sizes)
        low, median, high = (
            "{} x {}".format(*np.percentile(sizes, q, axis=0, method="nearest"))
            for q in (0, 50, 100)
        )
        rows["height x width"] = f"{low} to {high}, median {median}"
        rows["dtype"] = ", ".join(f"{name}: {count:,}" for name, count in report.dtypes.items())
        if len(report.dtypes) > 1:
            rows["dtype"] += "; training needs images of one dtype"
    if text := str(report.nodata):
        rows["NoData"] = text
    if report.uint16_bits:
        rows["uint16 values"] = f"use {report.uint16_bits} of 16 bits; all levels are kept"
    if report.used_bits:
        rows["read with 8 bits"] = f"{len(report.used_bits):,}: {describe_loss(report.used_bits)}"
    scan = getattr(source, "scan", None)
    if scan and scan.other_suffixes:
        rows["other files, ignored"] = ", ".join(
            f"{count} {suffix or 'without suffix'}"
            for suffix, count in scan.other_suffixes.most_common(5)
        )
    if scan and scan.broken_links:
        rows["broken symlinks, ignored"] = len(scan.broken_links)
    return rows


def _print_training_flags(name: str, folder: str | Path | None) -> None:
    path = f" --config.data.path={shlex.quote(str(folder))}" if folder else ""
    print(f"To train on it: --config.data.source=tfds --config.data.name={name}{path}")


if __name__ == "__main__":
    cli.run_command(main)
