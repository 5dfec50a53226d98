"""Mean intersection over union (mIoU), pixel accuracy and mean accuracy of segmentation."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

CONVENTIONS = ("standard", "pixio", "capi")
PIXIO_EPS = 1e-6  # pixels that its evaluation adds to every union


@dataclass(frozen=True)
class SegmentationScore:
    """Fractions, 0..1, over all labeled pixels of all images together.

    iou: of every class, NaN if it is in neither truth nor prediction; mean_accuracy: of the classes
    in the truth, their mean recall; pixels: labeled ones.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: tuple[float, ...]
    images: int
    pixels: int


def count_pixels(
    truth: Int[np.ndarray, "*n"], prediction: Int[np.ndarray, "*n"], num_classes: int, ignore: int
) -> Int[np.ndarray, "classes classes1"]:
    """Return the number of pixels by true class (row) and predicted one (column).

    The last column has predictions that are no class. Pixels of truth `ignore` are left out.

    Raises:
      ValueError: the truth has a number that is not a class.
    """
    labeled = truth != ignore
    truth, prediction = truth[labeled].astype(int), prediction[labeled].astype(int)
    if truth.size and not 0 <= truth.min() <= truth.max() < num_classes:
        raise ValueError(
            f"classes from {truth.min()} to {truth.max()}, but there are {num_classes}"
        )
    known = (prediction >= 0) & (prediction < num_classes)
    cells = truth * (num_classes + 1) + np.where(known, prediction, num_classes)
    counts = np.bincount(cells, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def segmentation_score(
    counts: Int[np.ndarray, "classes classes1"], images: int, convention: str = "standard"
) -> SegmentationScore:
    """Return the score of pixels counted by `count_pixels`.

    Args:
      convention: "standard" averages the IoU over the classes in truth or prediction. To compare
        with numbers of others: "pixio" averages over all classes, those in neither with 0 (Yang et
        al. 2025); "capi" has predictions that are no class as one more class (Darcet et al. 2025).
    """
    counts = counts.astype(float)
    true, hits = counts.sum(axis=1), np.diagonal(counts)
    union = true + counts[:, :-1].sum(axis=0) - hits
    iou = _divide(hits, union)
    averaged = iou[~np.isnan(iou)]
    if convention == "pixio":
        averaged = hits / (union + PIXIO_EPS)
    if convention == "capi" and counts[:, -1].any():
        averaged = np.append(averaged, 0.0)
    recall = _divide(hits, true)
    return SegmentationScore(
        miou=_mean(averaged),
        pixel_accuracy=_mean(_divide(hits.sum(keepdims=True), true.sum(keepdims=True))),
        mean_accuracy=_mean(recall[~np.isnan(recall)]),
        iou=tuple(iou.tolist()),
        images=images,
        pixels=int(true.sum()),
    )


def _divide(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
