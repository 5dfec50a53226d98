"""Demo dataset: crops of photographs that ship inside Python packages.

The label of a crop is the photograph that it was cut from. Training crops come from the left part
of each photograph and test crops from the right part, so no pixel is in both splits. It is a TFDS
builder that writes array_record, so it is read in the same way as ImageNet.
"""

import importlib.util
import io
import zlib
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
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


def crops(name: str, split: str) -> list[Image.Image]:
    """Return the crops of a photograph for a split; deterministic."""
    image = photograph(name)
    border = round(image.width * TRAIN_FRACTION)
    left, right = (0, border) if split == "train" else (border, image.width)
    rng = np.random.default_rng([zlib.crc32(name.encode()), split == "train"])
    cropped = []
    for _ in range(NUM_CROPS[split]):
        side = int(rng.integers(CROP_SIDES[0], min(CROP_SIDES[1], right - left) + 1))
        x = int(rng.integers(left, right - side + 1))
        y = int(rng.integers(0, image.height - side + 1))
        cropped.append(image.crop((x, y, x + side, y + side)))
    return cropped


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
                encoded = io.BytesIO()
                crop.save(encoded, "JPEG", quality=95)
                encoded.seek(0)
                yield f"{name}_{number:03d}", {"image": encoded, "label": name}
