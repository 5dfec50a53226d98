"""Demo datasets: crops and mosaics of photographs that ship inside Python packages.

The label of a crop is the photograph that it was cut from. Training crops come from the left part
of each photograph and test crops from the right part, so no pixel is in both splits. Mosaics are
made of crops, one in each cell of a Voronoi diagram, with the photograph of every pixel as mask.
They are TFDS builders that write array_record, so they are read in the same way as ImageNet.
"""

import importlib.util
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

from mae_jax.utils.errors import UserError

# Class name -> package and file; the packages are those of the "demo" extra.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "cell": ("skimage", "data/cell.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "portrait": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
SHORT_SIDE = 256  # pixels, of a photograph before cropping
TRAIN_FRACTION = 0.6  # of the width
CROP_SIDES = (64, 96)  # pixels, smallest and largest
NUM_CROPS = {"train": 400, "test": 80}  # per photograph
NUM_MOSAICS = {"train": 1000, "validation": 250}
MOSAIC_SIDE = 96  # pixels
MOSAIC_CELLS = (3, 6)  # fewest and most


def photograph(name: str) -> Image.Image:
    """Return a photograph in RGB, with its short side resized to SHORT_SIDE."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the demo dataset contains a photograph of {package}, which is not installed: "
            "pip install matplotlib scikit-image scikit-learn, as the extra [demo] does"
        )
    with Image.open(Path(spec.submodule_search_locations[0]) / file) as image:
        image = image.convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def columns(width: int, split: str) -> tuple[int, int]:
    """Return the first column of a photograph for a split, and the one after the last."""
    border = round(width * TRAIN_FRACTION)
    return (0, border) if split == "train" else (border, width)


def crops(name: str, split: str) -> list[Image.Image]:
    """Return the crops of a photograph for a split; deterministic."""
    image = photograph(name)
    left, right = columns(image.width, split)
    rng = np.random.default_rng([zlib.crc32(name.encode()), split == "train"])
    cropped = []
    for _ in range(NUM_CROPS[split]):
        side = int(rng.integers(CROP_SIDES[0], min(CROP_SIDES[1], right - left) + 1))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(0, image.height - side + 1))
        cropped.append(image.crop((x, y, x + side, y + side)))
    return cropped


def mosaics(split: str) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]]:
    """Yield mosaics of crops, and the number of the photograph of every pixel; deterministic."""
    images = [np.asarray(photograph(name)) for name in PHOTOGRAPHS]
    rng = np.random.default_rng([1, split == "train"])
    side = MOSAIC_SIDE
    pixels = np.moveaxis(np.mgrid[:side, :side], 0, -1)
    for _ in range(NUM_MOSAICS[split]):
        count = int(rng.integers(MOSAIC_CELLS[0], MOSAIC_CELLS[1] + 1))
        centers = rng.uniform(0, side, (count, 2))
        cell = np.square(pixels[:, :, None] - centers).sum(axis=-1).argmin(axis=-1)
        mosaic, mask = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.uint8)
        for number, label in enumerate(rng.permutation(len(images))[:count]):
            image, inside = images[label], cell == number
            left, right = columns(image.shape[1], split)
            x = int(rng.integers(left, right - side + 1))
            y = int(rng.integers(0, len(image) - side + 1))
            mosaic[inside] = image[y : y + side, x : x + side][inside]
            mask[inside] = label
        yield mosaic, mask


def encode(image: Image.Image, file_format: str) -> io.BytesIO:
    """Return an encoded image as a file; TFDS would encode arrays by TensorFlow."""
    file = io.BytesIO()
    image.save(file, file_format, quality=95)
    file.seek(0)
    return file


class PhotoCrops(tfds.core.GeneratorBasedBuilder):
    """Crops of 19 photographs, labeled by photograph; disjoint regions for train and test."""

    VERSION = tfds.core.Version("1.0.0")
    SUPPORTED_FILE_FORMATS = ["array_record"]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(PHOTOGRAPHS)),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=__doc__)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in NUM_CROPS}

    def _generate_examples(self, split: str):
        for name in PHOTOGRAPHS:
            for number, crop in enumerate(crops(name, split)):
                yield f"{name}_{number:03d}", {"image": encode(crop, "JPEG"), "label": name}


class PhotoMosaics(tfds.core.GeneratorBasedBuilder):
    """Mosaics of crops of 19 photographs, with masks; disjoint regions for the splits."""

    VERSION = tfds.core.Version("1.0.0")
    SUPPORTED_FILE_FORMATS = ["array_record"]

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (MOSAIC_SIDE, MOSAIC_SIDE)
        masks = tfds.features.LabeledImage(
            labels=list(PHOTOGRAPHS), shape=(*shape, 1), encoding_format="png"
        )
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(*shape, 3), encoding_format="png"),
                "segmentation_mask": masks,
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=__doc__)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in NUM_MOSAICS}

    def _generate_examples(self, split: str):
        for number, (image, mask) in enumerate(mosaics(split)):
            encoded = (encode(Image.fromarray(x), "PNG") for x in (image, mask))
            yield f"{number:04d}", dict(zip(("image", "segmentation_mask"), encoded))
