"""Pictures of segmentation: image, truth, prediction and errors."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from mae_jax.convert.model_info import ModelInfo
from mae_jax.data.decode import decode
from mae_jax.data.segmentation import SegmentationSource, resize_mask
from mae_jax.data.transforms import resize
from mae_jax.evaluate.figures import image_grid, to_rgb_uint8
from mae_jax.evaluate.segmentation import Prediction

SIDE = 224  # pixels of a picture
ERROR, CORRECT, UNLABELED = (214, 39, 40), (225, 225, 225), (255, 255, 255)


def class_colors(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Return distinct colors, as in Pascal VOC: bits of the number, spread over the channels."""
    numbers = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colors


def color_mask(mask: Int[np.ndarray, "h w"], num_classes: int) -> UInt8[np.ndarray, "h w 3"]:
    """Return the colors of class numbers; white where there is no class."""
    colors = np.concatenate([class_colors(num_classes), [UNLABELED]]).astype(np.uint8)
    known = (mask >= 0) & (mask < num_classes)
    return colors[np.where(known, mask, num_classes)]


def segmentation_figure(
    source: SegmentationSource,
    predictions: Sequence[Prediction],
    info: ModelInfo,
    num_classes: int,
    show: Sequence[int],
) -> UInt8[np.ndarray, "y x 3"]:
    """Draw predictions in a row each; the errors are red.

    Args:
      show: channels of images that are neither gray nor RGB.
    """
    size = (SIDE, SIDE)
    rows = []
    for prediction in predictions:
        encoded = source[prediction.index]["image"]
        image = decode(encoded, info.channels, bit_depth=info.bit_depth, options=info.read_options)
        image = resize(image, size)
        image = to_rgb_uint8(image[None], show, *info.stats(image.dtype))[0]
        truth, predicted = (
            resize_mask(mask.astype(np.int32), size)
            for mask in (source.mask(prediction.index), prediction.classes)
        )
        errors = np.where((truth == predicted)[..., None], CORRECT, ERROR)
        errors = np.where((truth == source.ignore)[..., None], UNLABELED, errors).astype(np.uint8)
        masks = (color_mask(mask, num_classes) for mask in (truth, predicted))
        rows.append((np.broadcast_to(image, (*size, 3)), *masks, errors))
    labels = ["image", "truth", "prediction", "errors"]
    return image_grid([np.stack(column) for column in zip(*rows)], labels)
