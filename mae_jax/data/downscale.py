"""Write a downscaled JPEG copy of a dataset, which is faster to read but not the same data."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.data.decode import ORIENTATION, Encoded, decode, exif_orientation
from mae_jax.data.file_kinds import JPEG, UPRIGHT
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sources import DERIVED_PREFIX, DataError, Source, bad_image_error
from mae_jax.data.transforms import resize
from mae_jax.utils import console

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class DownscaleJpeg:
    """Converts an image to a JPEG with a limited short side; a smaller JPEG is returned as is.

    Args:
      channels: 1 or 3.
      short_side: maximum, in pixels.
      quality: JPEG quality, 1 to 100.
      bit_depth: as in `decode`; that range is scaled to 8 bits.
    """

    channels: int
    short_side: int
    quality: int
    bit_depth: int | None = None

    def __call__(self, encoded: Encoded) -> bytes:
        """Return the bytes of the JPEG.

        Raises:
          DataError: the image is bad, or its dtype is not uint8.
        """
        image = decode(encoded, self.channels, bit_depth=self.bit_depth)
        if self.bit_depth is not None and 0 <= image.min() <= image.max() <= 1:
            image = (255 * image).round().astype(np.uint8)
        if image.dtype != np.uint8:
            raise DataError(f"its dtype is {image.dtype}, which JPEG does not support")
        scale = self.short_side / min(image.shape[:2])
        if scale >= 1 and isinstance(encoded, bytes) and encoded.startswith(JPEG):
            return encoded
        if scale < 1:
            height, width = (max(1, round(side * scale)) for side in image.shape[:2])
            image = resize(image, (height, width))
        exif = Image.Exif()
        if isinstance(encoded, bytes) and not encoded.startswith(UPRIGHT):
            exif[ORIENTATION] = exif_orientation(encoded)  # for data.exif=True
        buffer = io.BytesIO()
        pil_image = Image.fromarray(image.squeeze(-1) if self.channels == 1 else image)
        pil_image.save(buffer, "JPEG", quality=self.quality, exif=exif)
        return buffer.getvalue()


class DownscaledDataset(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a downscaled copy.

    Args:
      name: name of the copy.
      folder: TFDS data_dir to write to.
      sources: source by name of the split; all have the same classes.
      downscale: converts each image.
      threads: number of threads that convert images.
      skip: leave out bad images, and log them.
    """

    VERSION = tfds.core.Version("1.0.0")
    SUPPORTED_FILE_FORMATS = ["array_record"]

    def __init__(
        self,
        name: str,
        folder: Path,
        sources: Mapping[str, Source],
        downscale: DownscaleJpeg,
        *,
        threads: int,
        skip: bool,
    ):
        self.name = name
        self._sources, self._downscale = sources, downscale
        self._threads, self._skip = threads, skip
        self._classes = next(iter(sources.values())).classes
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (None, None, self._downscale.channels)
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=shape, encoding_format="jpeg")
        }
        if self._classes:
            features["label"] = tfds.features.ClassLabel(names=list(self._classes))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=(
                f"{DERIVED_PREFIX}images have a short side of at most {self._downscale.short_side} "
                f"pixels, and were saved as JPEG of quality {self._downscale.quality}"
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(source) for split, source in self._sources.items()}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        def convert(index: int) -> tuple[bytes, int] | DataError:
            try:
                record = source[index]
                return self._downscale(record["image"]), record["label"]
            except DataError as error:
                return error

        results = ordered_parallel_map(convert, len(source), self._threads)
        for index, result in enumerate(console.progress(results, len(source))):
            if isinstance(result, DataError):
                if not self._skip:
                    hint = "Repair or remove it, or leave it out with --skip-bad"
                    raise bad_image_error(source, index, result, hint)
                log.warning("left out a bad image: %s: %s", source.describe(index), result)
                continue
            features: dict[str, Any] = {"image": io.BytesIO(result[0])}
            yield index, features | ({"label": result[1]} if self._classes else {})


def write_dataset(dataset: DownscaledDataset) -> Any:
    """Write the dataset as array_record; return its builder.

    Raises:
      DataError: a dataset of that name exists, an image is bad, or the disk is.
    """
    if dataset.is_prepared():
        raise DataError(f"{dataset.data_dir} exists: remove it, or choose another --name")
    tfds.disable_progress_bar()  # ours also shows the time left
    try:
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            dataset.download_and_prepare(file_format="array_record", download_dir=downloads)
    except BaseException as error:
        for folder in Path(dataset.data_dir).parents[:2]:  # of the dataset, and the data_dir
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
        if isinstance(error, RuntimeError):  # of array_record, which writes the files
            raise DataError(f"{dataset.data_dir} could not be written: {error}") from error
        raise
    return dataset
