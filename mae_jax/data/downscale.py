"""A copy of a data set with smaller images, which are faster to read: a change of the data."""

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

from mae_jax.data.decode import JPEG, NPY, ORIENTATION, TIFF, ZIP, Encoded, decode, orientation_of
from mae_jax.data.loader import ordered_parallel_map
from mae_jax.data.sources import DERIVED_PREFIX, DataError, Source, bad_image_error
from mae_jax.data.transforms import resize
from mae_jax.utils import console

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class DownscaleJpeg:
    """Image -> JPEG with a short side of at most so many pixels; a smaller JPEG stays as it is."""

    channels: int
    short_side: int
    quality: int

    def __call__(self, encoded: Encoded) -> bytes:
        """DataError where the image is bad, or no JPEG can hold it."""
        image = decode(encoded, self.channels)
        if image.dtype != np.uint8:
            raise DataError(f"its values are {image.dtype}, which no JPEG can hold")
        scale = self.short_side / min(image.shape[:2])
        if scale >= 1 and isinstance(encoded, bytes) and encoded.startswith(JPEG):
            return encoded
        if scale < 1:
            height, width = (max(1, round(side * scale)) for side in image.shape[:2])
            image = resize(image, (height, width))
        picture = Image.fromarray(image.squeeze(-1) if self.channels == 1 else image)
        exif = Image.Exif()
        if isinstance(encoded, bytes) and not encoded.startswith((NPY, ZIP, *TIFF)):
            exif[ORIENTATION] = orientation_of(encoded)  # for whoever wants images upright
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality, exif=exif)
        return buffer.getvalue()


class DownscaledDataset(tfds.core.GeneratorBasedBuilder):
    """Sources with their images shrunk, as a TFDS data set.

    Args:
      sources: by the name of their split.
      skip: leave bad images out, and name them in the log.
    """

    VERSION = tfds.core.Version("1.0.0")
    SUPPORTED_FILE_FORMATS = ["array_record"]

    def __init__(
        self,
        name: str,
        folder: Path,
        sources: Mapping[str, Source],
        shrink: DownscaleJpeg,
        *,
        threads: int,
        skip: bool,
    ):
        self.name = name
        self._sources, self._shrink, self._threads, self._skip = sources, shrink, threads, skip
        self._classes = next(iter(sources.values())).classes
        super().__init__(data_dir=str(folder), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (None, None, self._shrink.channels)
        features: dict[str, Any] = {
            "image": tfds.features.Image(shape=shape, encoding_format="jpeg")
        }
        if self._classes:
            features["label"] = tfds.features.ClassLabel(names=list(self._classes))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            description=f"{DERIVED_PREFIX}images have a short side of at most {self._shrink.short_side} "
            f"pixels, and were saved as JPEG of quality {self._shrink.quality}",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(source) for split, source in self._sources.items()}

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        def made(number: int) -> tuple[bytes, int] | DataError:
            try:
                record = source[number]
                return self._shrink(record["image"]), record["label"]
            except DataError as error:
                return error

        examples = console.progress(
            ordered_parallel_map(made, len(source), self._threads), len(source)
        )
        for number, example in enumerate(examples):
            if isinstance(example, DataError):
                if not self._skip:
                    advice = "Mend or remove it, or leave it out: --skip-bad"
                    raise bad_image_error(source, number, example, advice)
                log.warning("left out a bad image: %s: %s", source.describe(number), example)
                continue
            features: dict[str, Any] = {"image": io.BytesIO(example[0])}
            yield number, features | ({"label": example[1]} if self._classes else {})


def write_dataset(smaller: DownscaledDataset) -> Any:
    """Writes the data set as array_record; returns its builder.

    Raises:
      DataError: there is one of that name already, or an image is bad.
    """
    if smaller.is_prepared():
        raise DataError(f"{smaller.data_dir} exists already: remove it, or take another --name")
    tfds.disable_progress_bar()  # ours also knows how much is left
    try:
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            smaller.download_and_prepare(file_format="array_record", download_dir=downloads)
    except BaseException:
        for folder in Path(smaller.data_dir).parents[:2]:  # of the data set, and the one it is in
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty
        raise
    return smaller
