"""Score the images of a dataset by the reconstruction loss of a checkpoint, for data.sampling."""

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.preprocessing import make_transform
from mae_jax.convert.pretrained import Params, PretrainedModel
from mae_jax.data.decode import decode
from mae_jax.data.factory import detect_dataset
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sampling import ImageScores, color_entropy
from mae_jax.data.sources import DataError, Source, bad_image_error
from mae_jax.distributed import sharding
from mae_jax.models.patches import gather_patches
from mae_jax.tasks.masking import SAMPLERS, Mask
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.utils import cli, console
from mae_jax.utils.cpus import available_cpus

QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percent, of the printed table
MAX_NAMED = 5  # bad images that are logged by name

log = logging.getLogger("mae_jax")


def score_command(parser: argparse.ArgumentParser) -> None:
    """Write the reconstruction loss, color entropy and size of every image, for data.sampling."""
    parser.add_argument(
        "data", type=cli.dataset_text, help="folder of images, or name of a TFDS dataset"
    )
    parser.add_argument(
        "--data-dir", type=cli.path_text, help="directory of TFDS datasets (the default of TFDS)"
    )
    parser.add_argument(
        "--split", help="split to score (train, or everything in a folder without splits)"
    )
    parser.add_argument(
        "--image-feature", default="image", help="image feature of a TFDS dataset (image)"
    )
    parser.add_argument("--out", type=cli.path_argument, required=True, help="the table, .npz")
    convert_cli.add_checkpoint(parser)
    convert_cli.add_batch_size(parser)
    parser.add_argument("--mask", choices=SAMPLERS, default="random")
    parser.add_argument(
        "--mask-ratio", type=float, help="fraction of patches to hide (the checkpoint's)"
    )
    parser.add_argument(
        "--masks", type=cli.positive_int, default=1, help="masks per image, of the mean loss (1)"
    )
    parser.add_argument("--seed", type=cli.uint32, default=0, help="of the masks (0)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out bad images instead of stopping"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Score the images that the command line names; print quantiles and the config overrides."""
    cli.check_output("--out", arguments.out, ".npz")
    dataset = detect_dataset(arguments.data, arguments.data_dir, arguments.image_feature)
    split = arguments.split
    if split is None:
        split = "" if dataset.splits() == [""] else "train"
    source = dataset.open(split)
    model, params = convert_cli.load_model(arguments)
    scores = score_images(
        model,
        params,
        source,
        mask=arguments.mask,
        mask_ratio=arguments.mask_ratio,
        masks=arguments.masks,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        skip_bad=arguments.skip_bad,
        about={"data": f"{arguments.data} {split}".strip(), "checkpoint": arguments.checkpoint},
    )
    scores.write(arguments.out)
    _print(scores, arguments.out)


def _print(scores: ImageScores, path: Path) -> None:
    good = scores.short_side > 0
    columns = {
        "loss": scores.loss,
        "entropy, bits": scores.entropy,
        "short side, pixels": scores.short_side,
    }
    rows = [
        (name, *(f"{value:.4g}" for value in np.percentile(values[good], QUANTILES)))
        for name, values in columns.items()
    ]
    title = f"{path}: {cli.pluralize(int(good.sum()), 'image')}"
    console.print_table(title, ("percentile", *map(str, QUANTILES)), rows)
    print(f"--config.data.sampling.scores={path}")
    median = float(np.median(scores.loss[good]))
    kept = np.minimum(1, scores.loss[good] / median).mean() if median else 1.0
    print(f"--config.data.sampling.loss={median:.4g} (the median) keeps {kept:.0%} of them")


def score_images(
    model: PretrainedModel,
    params: Params,
    source: Source,
    *,
    mask: str = "random",
    mask_ratio: float | None = None,
    masks: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    skip_bad: bool = False,
    about: dict[str, Any] | None = None,
) -> ImageScores:
    """Return the scores of all images of a source, computed on all devices of this process.

    The masks of an image depend on the seed and its index only. The loss is that of training: over
    the masked patches, of the checkpoint's target.

    Args:
      mask, mask_ratio: as in `PretrainedModel.task`.
      masks: per image, over which the loss is averaged.
      batch_size: images at a time.
      skip_bad: log bad images, and leave their scores empty.
      about: entries of `ImageScores.about`.

    Raises:
      ConvertError: the checkpoint has no decoder, or its target is unknown.
      DataError: an image is bad, or of another dtype than the model takes.
    """
    mesh = sharding.make_mesh()
    params = jax.device_put(params, sharding.state_shardings(params, mesh))
    batch_size = sharding.round_up_batch(min(batch_size, len(source)), mesh)
    key = jax.random.key(seed)
    loss = np.full(len(source), np.nan, np.float32)
    entropy, short_side = loss.copy(), np.zeros(len(source), np.int32)
    task: Pretrain | None = None
    for rows in _batches(model, source, batch_size, skip_bad):
        indices = np.array([row[0] for row in rows])
        images = np.stack([row[1] for row in rows])
        task = task or model.task(mask=mask, mask_ratio=mask_ratio, dtype=images.dtype)
        padding = np.arange(batch_size) % len(rows)
        batch = sharding.shard_batch(
            {"images": images[padding], "indices": indices[padding].astype(np.uint32)}, mesh
        )
        losses = _losses(task, masks, key, params, **batch)
        loss[indices] = np.asarray(losses)[: len(rows)]
        entropy[indices] = [row[2] for row in rows]
        short_side[indices] = [row[3] for row in rows]
    bad = short_side == 0
    if bad.all():
        raise DataError(f"all of {cli.pluralize(len(source), 'image')} are bad")
    if (broken := np.flatnonzero(~bad & ~np.isfinite(loss))).size:
        raise DataError(
            f"the loss of {source.describe(int(broken[0]))} is NaN or Inf, as of {broken.size} of "
            f"{len(source)} images: the weights may be corrupt, or too large for --dtype"
        )
    settings = {"mask": mask, "mask_ratio": mask_ratio, "masks": masks, "seed": seed}
    about = {**(about or {}), "fingerprint": source.fingerprint(), **settings}
    return ImageScores(loss, entropy, short_side, about)


Row = tuple[int, np.ndarray, float, int]  # index, image for the model, entropy, short side


def _batches(
    model: PretrainedModel, source: Source, size: int, skip_bad: bool
) -> Iterator[list[Row]]:
    """Yield the images of a source in lists of at most `size`, without bad ones."""
    info, bad = model.info, 0
    transform = make_transform(info.of_decoded)

    def read(index: int) -> Row | DataError:
        try:
            encoded = source[index]["image"]
            pixels = decode(encoded, info.channels, info.exif, info.bit_depth, info.read_options)
            image = transform(pixels)["image"]
        except DataError as error:
            return bad_image_error(source, index, error, "Repair or remove it, or use --skip-bad")
        return index, image, color_entropy(pixels), min(pixels.shape[:2])

    rows: list[Row] = []
    results = ordered_parallel_map(read, len(source), available_cpus())
    for row in console.progress(results, len(source)):
        if isinstance(row, DataError):
            if not skip_bad:
                raise row
            bad += 1
            if bad <= MAX_NAMED:
                log.warning("%s", str(row).rsplit(". Repair", 1)[0])
            continue
        if not info.accepts(row[1].dtype):
            raise DataError(
                f"{source.describe(row[0])} is read as {row[1].dtype}, but the mean and std of "
                "this model are for images of other units"
            )
        rows.append(row)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows
    if bad:
        log.warning("left out %s", cli.pluralize(bad, "bad image"))


@partial(jax.jit, static_argnums=(0, 1))
def _losses(
    task: Pretrain,
    masks: int,
    key: Array,
    params: Params,
    images: Shaped[Array, "b h w c"],
    indices: Int[Array, " b"],
) -> Float[Array, " b"]:
    """Return the mean loss of each image over its masks; 0 for masks of patches without data."""
    patches, valid = task.to_patches(images), task.valid_values(images)

    def loss(number: Int[Array, ""]) -> Float[Array, " b"]:
        keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.fold_in(key, index), number))
        mask = Mask(
            *(ids[:, 0] for ids in jax.vmap(lambda k: task.sample_mask(k, 1))(keys(indices)))
        )
        errors = task.squared_errors(params, patches, mask, valid=valid)
        if valid is None:
            return errors.mean(axis=(1, 2))
        count = gather_patches(valid, mask.ids_masked).sum(axis=(1, 2))
        return errors.sum(axis=(1, 2)) / jnp.maximum(count, 1)

    return jax.lax.map(loss, jnp.arange(masks)).mean(axis=0)
