"""Features of the patches of images with masks, and the accuracy of segmentation probes on them.

Every image is seen in one or several views of the model's size: the whole image, resized together
with its mask, or windows of the unresized image. Predictions of all views are interpolated to the
mask's own size, where every labeled pixel counts once.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, Num

from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.segmentation import Mask, SegmentationSource
from mae_jax.evaluate.segmentation_metrics import (
    SegmentationScore,
    count_pixels,
    segmentation_score,
)
from mae_jax.evaluate.segmentation_views import Example, Views
from mae_jax.models.patches import num_patch_values
from mae_jax.models.segmentation import bilinear_weights
from mae_jax.utils import console
from mae_jax.utils.cpus import available_cpus
from mae_jax.utils.errors import UserError
from mae_jax.utils.sides import Sides, height_width

Grids = dict[str, np.ndarray]  # features [..., rows, columns, d] by name
GridFn = Callable[[np.ndarray], Mapping[str, Any]]  # images [b, h, w, c] -> features by name
BLOCK = 2**24  # scores to interpolate at a time


@dataclass(frozen=True, kw_only=True)
class SegmentationSetup:
    """How images are read and predictions compared, the same for all probes.

    Args:
      grids: returns the features [b, rows, columns, d] of images, by name.
      batch_size: views that `grids` takes at a time.
      patch: side of a patch, or its height and width, pixels.
      ignore: class number of pixels without label.
      align_corners: of upsampling, see `bilinear_weights`.
      convention: of the metrics, see `segmentation_score`.
    """

    grids: GridFn
    views: Views
    batch_size: int
    patch: Sides
    num_classes: int
    ignore: int
    align_corners: bool = False
    convention: str = "standard"
    show_progress: bool = True

    def features(self, source: SegmentationSource) -> Iterator[tuple[Example, Grids]]:
        """Yield every image with the features of its views, by name."""
        waiting: deque[Example] = deque()

        def views() -> Iterator[np.ndarray]:
            read = lambda index: self.views.read(source, index, self.num_classes)
            examples = ordered_parallel_map(read, len(source), available_cpus())
            if self.show_progress:
                examples = console.progress(examples, len(source))
            for example in examples:
                waiting.append(example)
                yield from example.views

        rows: list[Grids] = []
        for row in self._map_batches(views()):
            rows.append(row)
            if len(rows) == len(waiting[0].views):
                yield waiting.popleft(), {n: np.stack([r[n] for r in rows]) for n in rows[0]}
                rows = []

    def _map_batches(self, views: Iterator[np.ndarray]) -> Iterator[Grids]:
        """Yield the features of every view."""
        while batch := list(islice(views, self.batch_size)):
            images = np.stack(batch + [batch[-1]] * (self.batch_size - len(batch)))
            grids = jax.device_get(dict(self.grids(images)))
            for row in range(len(batch)):
                yield {name: x[row] for name, x in grids.items()}


@dataclass(frozen=True)
class TrainPatches:
    """Features of training images, with masks at the resolution of the model.

    grids: [n, rows, columns, d] of all views by name, or {} if not kept; masks: of the views.
    bank: [m, d] by name, a sample of the patches; bank_masks: the class numbers of their pixels.
    """

    grids: Mapping[str, Float[np.ndarray, "n y x d"]]
    masks: Int[np.ndarray, "n h w"]
    bank: Mapping[str, Float[np.ndarray, "m d"]]
    bank_masks: Int[np.ndarray, "m p"]


def extract_patches(
    setup: SegmentationSetup,
    source: SegmentationSource,
    *,
    keep_grids: bool,
    bank: int,
    max_bytes: float = np.inf,
    seed: int = 0,
) -> TrainPatches:
    """Compute the features of training images; every image is read once.

    Args:
      keep_grids: keep the features of all patches.
      bank: number of patches of all images to sample, at most.
      max_bytes: of the features of all patches.

    Raises:
      UserError: these take more.
    """
    small = 0 <= setup.ignore < 256 and setup.num_classes <= 256
    to_dtype = lambda mask: mask.astype(np.uint8 if small else np.int32)
    grids: dict[str, list[np.ndarray]] = defaultdict(list)
    masks, sample, num_bytes = [], PatchSample(bank, seed), 0
    for example, features in setup.features(source):
        for number, mask in enumerate(example.view_masks):
            if keep_grids:
                masks.append(to_dtype(mask))
                for name, x in features.items():
                    grids[name].append(x[number])
                    num_bytes += x[number].nbytes
                if num_bytes > max_bytes:
                    raise UserError(
                        f"the features of {len(masks)} views take {num_bytes / 1e9:.1f} GB: allow "
                        "more with --max-gb, or use fewer images with --train-images"
                    )
            if bank:
                axes = dict(zip("pq", height_width(setup.patch)))
                pixels = rearrange(to_dtype(mask), "(y p) (x q) -> (y x) (p q)", **axes)
                flat = {name: x[number].reshape(-1, x.shape[-1]) for name, x in features.items()}
                sample.add(flat | {_PIXELS: pixels})
    sampled = sample.take()
    return TrainPatches(
        {name: np.stack(x) for name, x in grids.items()},
        np.stack(masks) if masks else np.zeros((0, *setup.views.size), np.uint8),
        {name: x for name, x in sampled.items() if name != _PIXELS},
        sampled.get(_PIXELS, np.zeros((0, num_patch_values(setup.patch, 1)), np.uint8)),
    )


_PIXELS = "class numbers"


class PatchSample:
    """A uniform sample of rows, of which at most twice as many are in memory.

    Each row gets a random number, and those with the smallest ones are kept.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._rng = size, np.random.default_rng(seed)
        self._limit = np.inf
        self._numbers: list[np.ndarray] = []
        self._rows: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, rows: Mapping[str, Num[np.ndarray, "n ..."]]) -> None:
        """Add rows of arrays by name."""
        numbers = self._rng.random(len(next(iter(rows.values()))))
        kept = np.flatnonzero(numbers < self._limit)
        self._numbers.append(numbers[kept])
        for name, x in rows.items():
            self._rows[name].append(x[kept])
        if sum(map(len, self._numbers)) > 2 * self._size:
            self._prune()

    def take(self) -> dict[str, Num[np.ndarray, "m ..."]]:
        """Return the sample, in the order in which it was added."""
        if self._numbers:
            self._prune()
        return {name: x[0] for name, x in self._rows.items()}

    def _prune(self) -> None:
        numbers = np.concatenate(self._numbers)
        kept = np.sort(np.argsort(numbers, kind="stable")[: self._size])
        if len(numbers) > self._size:
            self._limit = numbers[kept].max()
        self._numbers = [numbers[kept]]
        for name, x in self._rows.items():
            self._rows[name] = [np.concatenate(x)[kept]]


# A probe: returns scores of the classes for features of views, of any resolution.
Probe = Callable[[Float[np.ndarray, "v y x d"]], Float[np.ndarray, "v h w classes"]]


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of an image, for pictures."""

    index: int
    classes: Mask


def evaluate_probes(
    setup: SegmentationSetup,
    source: SegmentationSource,
    probes: Mapping[tuple[str, str], Probe],
    keep: Sequence[int] = (),
) -> tuple[
    dict[tuple[str, str], SegmentationScore], dict[tuple[str, str], float], list[Prediction]
]:
    """Return scores and seconds of probes, and the predictions of the first one for `keep`.

    Args:
      probes: by name of the measure and name of the features.
      keep: indices of images.
    """
    shape = (setup.num_classes, setup.num_classes + 1)
    counts = {name: np.zeros(shape, np.int64) for name in probes}
    seconds = dict.fromkeys(probes, 0.0)
    kept, first = [], next(iter(probes))
    for index, (example, grids) in enumerate(setup.features(source)):
        for name, probe in probes.items():
            begin = time.perf_counter()
            scores = probe(grids[name[1]])
            softmax = name[0] == "segment_linear" and len(scores) > 1
            classes = merge_views(scores, example, setup.align_corners, softmax=softmax)
            counts[name] += count_pixels(example.mask, classes, setup.num_classes, setup.ignore)
            seconds[name] += time.perf_counter() - begin
            if name == first and index in keep:
                kept.append(Prediction(index, classes))
    scores = {
        name: segmentation_score(table, len(source), setup.convention)
        for name, table in counts.items()
    }
    return scores, seconds, kept


def merge_views(
    scores: Float[np.ndarray, "v y x classes"],
    example: Example,
    align_corners: bool,
    *,
    softmax: bool,
) -> Mask:
    """Return the class of every pixel with the largest sum of upsampled scores over the views.

    Args:
      softmax: of the upsampled scores, before the sum.
    """
    height, width = example.mask.shape
    classes = np.empty((height, width), np.int32)
    step = max(BLOCK // (width * scores.shape[-1]), 1)
    for begin in range(0, height, step):
        end = min(begin + step, height)
        total = np.zeros((end - begin, width, scores.shape[-1]), np.float32)
        for grid, (top, left, rows, columns) in zip(scores, example.boxes):
            first, last = max(begin, top), min(end, top + rows)
            if first >= last:
                continue
            inside = slice(first - top, last - top)
            view = upsample_on_host(grid, (rows, columns), align_corners, inside)
            if softmax:
                view = np.exp(view - view.max(axis=-1, keepdims=True))
                view /= view.sum(axis=-1, keepdims=True)
            target = total[first - begin : last - begin, left : left + columns]
            target += view[:, : target.shape[1]]
        classes[begin:end] = total.argmax(axis=-1)
    return classes


def upsample_on_host(
    grid: Float[np.ndarray, "y x c"],
    size: tuple[int, int],
    align_corners: bool,
    rows: slice = slice(None),
) -> Float[np.ndarray, "h w c"]:
    """Interpolate some rows as `mae_jax.models.segmentation.upsample`; without compilation."""
    vertical, horizontal = (
        bilinear_weights(new, old, align_corners=align_corners)
        for new, old in zip(size, grid.shape)
    )
    return np.matmul(horizontal, np.tensordot(vertical[rows], grid, axes=1))
