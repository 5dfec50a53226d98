"""The suites segment_knn and segment_linear of `mae-jax evaluate`."""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

import mae_jax
from mae_jax.convert import cli as convert_cli
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.mask_checks import count_classes, require_masks
from mae_jax.data.segmentation import SegmentationSource, open_segmentation
from mae_jax.data.subsets import evenly_spaced_indices
from mae_jax.distributed import sharding
from mae_jax.distributed.inference import with_sharded_inputs
from mae_jax.evaluate.figures import check_display_channels, save_png
from mae_jax.evaluate.segmentation import (
    Probe,
    SegmentationSetup,
    TrainPatches,
    evaluate_probes,
    extract_patches,
)
from mae_jax.evaluate.segmentation_figure import segmentation_figure
from mae_jax.evaluate.segmentation_metrics import CONVENTIONS, SegmentationScore
from mae_jax.evaluate.segmentation_probes import KnnOptions, LinearOptions, knn_probe, linear_probe
from mae_jax.evaluate.segmentation_views import Views
from mae_jax.models.patches import num_patch_values, patchify
from mae_jax.utils import cli, console
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cpus import available_cpus
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")

SUITE = {
    "segment_knn": "segmentation by the nearest patches of the training images",
    "segment_linear": "segmentation by a linear layer on the patches",
}
ENCODER, RANDOM, COLORS = "encoder", "random encoder", "raw colors"
# Flags that influence the numbers, for --out; None is a default.
SETTINGS = ("image_size", "layers", "with_cls", "window", "stride", "ignore", "dtype", "seed")
SETTINGS += ("k", "temperature", "bank", "epochs", "learning_rate")
MAX_LISTED = 30  # classes in the table of IoU
PICTURES = 8  # images in --picture

Scores = Mapping[tuple[str, str], SegmentationScore]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the segmentation suites."""
    group = parser.add_argument_group(
        "segmentation",
        "--data is DIR with SPLIT/images and SPLIT/masks, files of the same names, and perhaps "
        "classes.txt; with SPLIT.npz (image, mask); or a TFDS dataset",
    )
    group.add_argument(
        "--mask-feature",
        default="segmentation_mask",
        help="mask feature of a TFDS dataset (segmentation_mask)",
    )
    group.add_argument(
        "--ignore", type=int, default=255, help="class number of pixels without label (255)"
    )
    group.add_argument(
        "--num-classes", type=cli.positive_int, help="(classes.txt, or the largest number + 1)"
    )
    group.add_argument(
        "--layers",
        type=cli.int_list,
        default=[],
        metavar="6,12",
        help="features of these blocks side by side, counted from 1 (the last)",
    )
    group.add_argument(
        "--with-cls", action="store_true", help="append the cls token to every patch"
    )
    group.add_argument(
        "--window",
        action="store_true",
        help="slide a window of --image-size over unresized images, instead of resizing them",
    )
    group.add_argument(
        "--stride", type=cli.int_pair, metavar="H,W", help="of the window, pixels (2/3 of it)"
    )
    group.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="standard",
        help="of the metrics, to compare with published numbers: see docs/evaluation.md (standard)",
    )
    group.add_argument(
        "--k", type=cli.positive_int, default=KnnOptions.k, help="neighbors of a patch (30)"
    )
    group.add_argument(
        "--temperature",
        type=cli.positive_float,
        default=KnnOptions.temperature,
        help="of their votes (0.07)",
    )
    group.add_argument(
        "--bank",
        type=cli.positive_int,
        default=KnnOptions.bank,
        help="maximum number of training patches to search, sampled (200000)",
    )
    group.add_argument(
        "--picture", type=cli.path_argument, metavar="PNG", help="draw predictions and errors"
    )


def run(arguments: argparse.Namespace, measures: Sequence[str]) -> None:
    """Evaluate the segmentation suites that --suite names."""
    if others := [name for name in measures if name not in SUITE]:
        raise UserError(f"--suite: {', '.join(others)} need class labels, so run them separately")
    if arguments.picture:
        cli.check_output("--picture", arguments.picture, ".png")
    begin = time.perf_counter()
    train, test = (
        _open(arguments, split) for split in (arguments.train_split, arguments.eval_split)
    )
    if arguments.train_images:
        train = train.evenly_spaced(arguments.train_images)
    names = _class_names(arguments, train)
    log.info("checking %d evaluation masks", len(test))
    require_masks(test, len(names), available_cpus())
    model, params = convert_cli.load_model(arguments)
    setup = _make_setup(arguments, model, params, len(names), train.ignore)
    _check_memory(setup, model, measures, arguments, train)

    log.info("features of %d training images", len(train))
    knn = KnnOptions(arguments.k, arguments.temperature, arguments.bank, arguments.seed)
    patches = extract_patches(
        setup,
        train,
        keep_grids="segment_linear" in measures,
        bank=arguments.bank if "segment_knn" in measures else 0,
        max_bytes=1e9 * arguments.max_gb,
        seed=arguments.seed,
    )
    probes, seconds = _make_probes(setup, measures, patches, knn, _linear_options(arguments))
    log.info("predictions for %d evaluation images", len(test))
    shown = evenly_spaced_indices(len(test), PICTURES) if arguments.picture else ()
    scores, spent, predictions = evaluate_probes(setup, test, probes, list(shown))
    seconds = {key: round(seconds[key] + spent[key], 2) for key in scores}

    title = f"{arguments.checkpoint} on {len(test)} images of {arguments.data}"
    _print(scores, seconds, names, title)
    if arguments.picture:
        show = check_display_channels((0, 1, 2), model.info.channels)
        save_png(
            arguments.picture, segmentation_figure(test, predictions, model.info, len(names), show)
        )
        print(arguments.picture)
    if arguments.out:
        total = round(time.perf_counter() - begin, 2)
        write_json(arguments.out, _report(arguments, train, names, scores, seconds, total))
        print(arguments.out)


def _open(arguments: argparse.Namespace, split: str) -> SegmentationSource:
    return open_segmentation(
        arguments.data,
        split,
        data_dir=arguments.data_dir,
        image_feature=arguments.image_feature,
        mask_feature=arguments.mask_feature,
        ignore=arguments.ignore,
    )


def _class_names(arguments: argparse.Namespace, train: SegmentationSource) -> tuple[str, ...]:
    """Return the names of the classes; without classes.txt their numbers.

    Raises:
      DataError: a mask cannot be read.
    """
    count = arguments.num_classes or len(train.class_names)
    if train.class_names and count != len(train.class_names):
        raise UserError(
            f"--num-classes {count}, but there are {len(train.class_names)} class names"
        )
    if not count:
        log.info("counting the classes of %d masks", len(train))
        count = count_classes(train, available_cpus())
        log.info("%d classes", count)
    return train.class_names or tuple(str(number) for number in range(count))


def _make_setup(
    arguments: argparse.Namespace,
    model: PretrainedModel,
    params: Params,
    num_classes: int,
    ignore: int,
) -> SegmentationSetup:
    info, mesh = model.info, sharding.make_mesh()
    layers = tuple(arguments.layers)
    for layer in layers:
        if layer > info.depth:
            raise UserError(f"--layers: there is no block {layer}, but 1 to {info.depth}")
    states = jax.device_put((params, model.random_params(arguments.seed)))
    states = jax.device_put(states, sharding.state_shardings(states, mesh))
    grids = jax.jit(partial(_grids, model, layers, arguments.with_cls))
    stride = arguments.stride
    if arguments.window and stride is None:
        stride = (info.image_size[0] * 2 // 3, info.image_size[1] * 2 // 3)
    if stride and (stride[0] > info.image_size[0] or stride[1] > info.image_size[1]):
        raise UserError(
            f"--stride {stride[0]},{stride[1]} is larger than the window of {info.image_size[0]} x "
            f"{info.image_size[1]} pixels (--image-size): some pixels would be in no window"
        )
    if stride and not arguments.window:
        raise UserError("--stride is that of --window, which is missing")
    mean = np.array(info.mean)
    return SegmentationSetup(
        grids=with_sharded_inputs(grids, mesh, states),
        views=Views(
            info.image_size,
            info.channels,
            fill=tuple((mean * 255).round() if info.accepts(np.uint8) else mean),
            stride=stride,
            overhang=arguments.convention == "pixio",
            interpolation=info.interpolation,
            bit_depth=info.bit_depth,
            options=info.read_options,
        ),
        batch_size=sharding.round_up_batch(arguments.batch_size, mesh),
        patch=info.patch,
        num_classes=num_classes,
        ignore=ignore,
        align_corners=arguments.convention == "pixio",
        convention=arguments.convention,
    )


def _grids(
    model: PretrainedModel,
    layers: tuple[int, ...],
    with_cls: bool,
    states: tuple[Params, Params],
    images: Array,
) -> dict[str, Float[Array, "b y x d"]]:
    """Return the features of the encoder and of the baselines."""
    patches = patchify(model.normalize(images), model.info.patch)
    colors = rearrange(
        patches, "b (y x) (p c) -> b y x p c", y=model.info.grid[0], c=model.info.channels
    )
    grids = {COLORS: colors.mean(axis=3)}
    for name, params in zip((ENCODER, RANDOM), states):
        features = model.features(params, images, layers=layers, grid=True)
        parts = []
        for suffix in [f"_{layer}" for layer in layers] or [""]:
            grid = features[f"grid{suffix}"]
            parts.append(grid)
            if with_cls:
                cls = features[f"cls{suffix}"][:, None, None]
                parts.append(jnp.broadcast_to(cls, (*grid.shape[:3], cls.shape[-1])))
        grids[name] = jnp.concatenate(parts, axis=-1)
    return grids


def _widths(model: PretrainedModel, arguments: argparse.Namespace) -> int:
    """Return the number of features of a patch, of all feature sets together."""
    encoder = model.info.width * max(len(arguments.layers), 1) * (1 + arguments.with_cls)
    return 2 * encoder + model.info.channels


def _check_memory(
    setup: SegmentationSetup,
    model: PretrainedModel,
    measures: Sequence[str],
    arguments: argparse.Namespace,
    train: SegmentationSource,
) -> None:
    """Raise UserError if the training features would not fit into memory."""
    rows, columns = model.info.grid
    patches = len(train) * rows * columns  # of one view per image
    pixels, required = num_patch_values(setup.patch, 1), 0.0
    if "segment_linear" in measures:
        required += patches * (_widths(model, arguments) * 4 + pixels)
    if "segment_knn" in measures:
        bank = min(arguments.bank, patches)
        required += bank * (_widths(model, arguments) * 4 + pixels + 4 * setup.num_classes)
    if required / 1e9 > arguments.max_gb:
        raise UserError(
            f"the features of {len(train)} training images take {required / 1e9:.1f} GB: allow "
            "them with --max-gb, or use fewer images with --train-images"
        )


def _linear_options(arguments: argparse.Namespace) -> LinearOptions:
    return LinearOptions(
        epochs=max(round(arguments.epochs or LinearOptions.epochs), 1),
        learning_rate=arguments.learning_rate or LinearOptions.learning_rate,
        seed=arguments.seed,
    )


def _make_probes(
    setup: SegmentationSetup,
    measures: Sequence[str],
    patches: TrainPatches,
    knn: KnnOptions,
    linear: LinearOptions,
) -> tuple[dict[tuple[str, str], Probe], dict[tuple[str, str], float]]:
    """Return the probes by measure and features, and the seconds to train each."""
    probes, seconds = {}, {}
    for measure in measures:
        for name in (ENCODER, RANDOM, COLORS):
            begin = time.perf_counter()
            if measure == "segment_knn":
                probe = knn_probe(patches.bank[name], patches.bank_masks, setup, knn)
            else:
                log.info("training a linear head on %s", name)
                probe = linear_probe(patches.grids[name], patches.masks, setup, linear)
            probes[measure, name] = probe
            seconds[measure, name] = time.perf_counter() - begin
    return probes, seconds


def _print(scores: Scores, seconds: Mapping[Any, float], names: Sequence[str], title: str) -> None:
    rows = [
        (
            *key,
            f"{score.miou:.3f}",
            f"{score.pixel_accuracy:.3f}",
            f"{score.mean_accuracy:.3f}",
            f"{seconds[key]:.1f}",
        )
        for key, score in scores.items()
    ]
    columns = ("measure", "features", "mIoU", "pixel acc.", "mean acc.", "s")
    console.print_table(title, columns, rows)
    measures = list(dict.fromkeys(measure for measure, _ in scores))
    encoders = [scores[measure, ENCODER].iou for measure in measures]
    listed = [
        (
            number,
            name,
            *("-" if np.isnan(iou[number]) else f"{iou[number]:.3f}" for iou in encoders),
        )
        for number, name in enumerate(names)
    ]
    console.print_table(
        "IoU of the encoder by class (-: in neither masks nor predictions)",
        ("class", "name", *measures),
        listed[:MAX_LISTED],
    )
    if len(listed) > MAX_LISTED:
        print(f"{len(listed) - MAX_LISTED} more classes: see --out")


def _report(
    arguments: argparse.Namespace,
    train: SegmentationSource,
    names: Sequence[str],
    scores: Scores,
    seconds: Mapping[Any, float],
    total: float,
) -> dict[str, Any]:
    """Return what --out holds, as JSON; a class in neither masks nor predictions is null."""
    rows = []
    for key, score in scores.items():
        iou = {n: None if np.isnan(x) else x for n, x in zip(names, score.iou)}
        row = {"measure": key[0], "features": key[1], **vars(score), "iou": iou}
        rows.append(row | {"seconds": seconds[key]})
    return {
        "checkpoint": arguments.checkpoint,
        "data": arguments.data,
        "train_split": arguments.train_split,
        "eval_split": arguments.eval_split,
        "train_images": len(train),
        "classes": len(names),
        "convention": arguments.convention,
        "settings": {name: vars(arguments)[name] for name in SETTINGS},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"mae_jax": mae_jax.__version__, "jax": jax.__version__},
        "results": rows,
        "seconds": total,
    }
