"""Curation of training images by scores: soft sampling by reconstruction loss, and filters.

As in Pixio (Yang et al. 2025), an image is kept with a probability that grows with the loss of a
pretrained model on it, and images of few colors or of low resolution are left out.
"""

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from mae_jax.data.sources import DataError, Source
from mae_jax.data.subsets import Subset
from mae_jax.utils.atomic import atomic_path

BINS = 256  # of the histogram of a channel
KEY = "data.sampling.scores"
ARRAYS = ("loss", "entropy", "short_side")

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class ImageScores:
    """Scores of the images of a source, by record index; NaN, and 0 pixels, of bad images.

    Attributes:
      loss: reconstruction loss of a pretrained model.
      entropy: of the color histogram, bits; see `color_entropy`.
      short_side: of the image file, pixels.
      about: what was scored: "fingerprint" of the source, "checkpoint", and settings.
    """

    loss: Float[np.ndarray, " n"]
    entropy: Float[np.ndarray, " n"]
    short_side: Int[np.ndarray, " n"]
    about: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the scores to a .npz file."""
        arrays = {name: vars(self)[name] for name in ARRAYS}
        with atomic_path(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, about=np.array(json.dumps(self.about)), **arrays)


def read_scores(path: Path) -> ImageScores:
    """Read the scores that `ImageScores.write` has written.

    Raises:
      DataError: the file cannot be read, or has no scores.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
            return ImageScores(**arrays, about=json.loads(str(file["about"])))
    except FileNotFoundError as error:
        raise DataError("does not exist", key=KEY, value=str(path)) from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = f"is not a table that mae-jax data score wrote: {error}"
        raise DataError(problem, key=KEY, value=str(path)) from error


def color_entropy(image: Num[np.ndarray, "h w c"]) -> float:
    """Return the entropy of a channel's histogram of 256 bins, mean over the channels, bits.

    That is 0 for one color and at most 8. NaN unless the image is uint8, or float32 from 0 to 1,
    where NaN, which has no data, is left out.
    """
    entropies = []
    for channel in np.moveaxis(image, -1, 0):
        values = channel[~np.isnan(channel)]
        if image.dtype != np.uint8:
            if image.dtype != np.float32 or not np.all((values >= 0) & (values <= 1)):
                return float("nan")
            values = (values * (BINS - 1)).round().astype(np.uint8)
        share = np.bincount(values, minlength=BINS) / max(values.size, 1)
        share = share[share > 0]
        entropies.append(-(share * np.log2(share)).sum())
    return float(np.mean(entropies))


def sample(
    source: Source,
    scores: ImageScores,
    *,
    seed: int,
    loss: float | None = None,
    min_entropy: float = 0.0,
    min_side: int = 0,
) -> Subset:
    """Return the images that filters and soft sampling keep, in order.

    Whether an image is kept depends on the seed, its index and its scores only.

    Args:
      loss: an image is kept with probability min(1, its loss / this); None keeps all.
      min_entropy: smallest entropy of the color histogram, bits.
      min_side: smallest short side, pixels.

    Raises:
      DataError: the scores are of other images, lack what is filtered by, or no image is left.
    """
    about, count = scores.about, len(scores.loss)
    if about.get("fingerprint") != source.fingerprint() or count != len(source):
        raise DataError(
            f"{KEY}: the scores are of {count:,} images of {about.get('data')}, not of these "
            f"{len(source):,}, or files have changed since: score them again with mae-jax data "
            "score"
        )
    good = scores.short_side > 0
    if min_entropy > 0 and np.isnan(scores.entropy[good]).any():
        raise DataError(
            "cannot be used: the scores have no entropy, since the images are not of 8 bits",
            key="data.sampling.min_entropy",
            value=min_entropy,
        )
    steps = {
        "bad images": good,
        f"below {min_side} pixels": scores.short_side >= min_side,
        f"entropy below {min_entropy:g} bits": ~(scores.entropy < min_entropy),
    }
    if loss is not None:
        draws = np.random.default_rng(seed).random(len(source))
        steps["by loss"] = draws * loss < scores.loss
    kept, removed = np.ones(len(source), bool), []
    for name, keep in steps.items():
        if count := int((kept & ~keep).sum()):
            removed.append(f"{count:,} {name}")
        kept &= keep
    log.info(
        "sampling keeps %s of %s images (left out: %s)",
        f"{int(kept.sum()):,}",
        f"{len(source):,}",
        ", ".join(removed) or "none",
    )
    if not kept.any():
        raise DataError(f"data.sampling leaves no image ({', '.join(removed)}): relax it")
    return Subset(source, np.flatnonzero(kept))
