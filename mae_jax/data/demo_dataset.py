"""A data set for machines without one: crops of photographs that ship inside Python packages.

The label of a crop is the photograph it was cut from. Training crops come from the left part of
each photograph and test crops from the right part, so no pixel is ever seen in both. It is a
TFDS builder like any other: stored as array_record, it walks the path that ImageNet walks.
"""

import importlib.util
import io
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# Name of the class -> package and file; the packages are those of the "demo" extra.
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
SHORT_SIDE = 256  # pixels, of a photograph before it is cut up
TRAIN_SHARE = 0.6  # of the width
WINDOW = (64, 96)  # pixels, smallest and largest side of a crop
CROPS = {"train": 400, "test": 80}  # of every photograph


def photograph(name: str) -> Image.Image:
    """One photograph, RGB, its short side scaled to SHORT_SIDE."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the embedded data set takes a photograph from {package!r}, which is not installed: "
            "pip install 'mae_jax[demo]'"
        )
    with Image.open(Path(spec.submodule_search_locations[0]) / file) as image:
        image = image.convert("RGB")
    scale = SHORT_SIDE / min(image.size)
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def crops(name: str, split: str) -> list[Image.Image]:
    """The crops of one photograph, the same on every machine."""
    image = photograph(name)
    border = round(image.width * TRAIN_SHARE)
    left, right = (0, border) if split == "train" else (border, image.width)
    rng = np.random.default_rng([zlib.crc32(name.encode()), split == "train"])
    cut = []
    for _ in range(CROPS[split]):
        side = int(rng.integers(WINDOW[0], min(WINDOW[1], right - left) + 1))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(0, image.height - side + 1))
        cut.append(image.crop((x, y, x + side, y + side)))
    return cut


class PhotoCrops(tfds.core.GeneratorBasedBuilder):
    """Crops of 19 photographs, labelled by photograph; disjoint regions for train and test."""

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
        return {split: self._generate_examples(split) for split in CROPS}

    def _generate_examples(self, split: str):
        for name in PHOTOGRAPHS:
            for number, crop in enumerate(crops(name, split)):
                encoded = io.BytesIO()
                crop.save(encoded, "JPEG", quality=95)
                encoded.seek(0)
                yield f"{name}_{number:03d}", {"image": encoded, "label": name}
