"""TFDS data sets as sources. TensorFlow is not needed, whichever way they were prepared."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mae_jax.data.sources import DERIVED_PREFIX, DataError, Record, fingerprint_of
from mae_jax.data.tfrecord import Shard, TfRecords

log = logging.getLogger("mae_jax")

DEMO_DATASETS = ("photo_crops",)


class TfdsSource:
    """A split of a TFDS data set, prepared as array_record or as TFRecord.

    Args:
      name: of the data set, as in "imagenet2012", "cifar10:3.0.2" or "eurosat/all".
      split: as in "train" or "train[:90%]".
      data_dir: where data sets are prepared; None is TFDS's own default.
      image: the feature that is the image.
      index_dir: where the index of TFRecord files is kept; None keeps none.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None,
        image: str = "image",
        index_dir: Path | None = None,
    ):
        builder = open_builder(name, data_dir)
        features: Any = builder.info.features
        if image not in features:
            raise DataError(
                f"{name} has no feature called {image!r}, only {', '.join(features)}: "
                "data.image_feature names it"
            )
        known: Any = builder.info.splits
        if split.isidentifier() and split not in known:
            raise DataError(f"{name} has no split {split!r}; it has {', '.join(known) or 'none'}")
        self.name, self.split, self._image = name, split, image
        # A label that is a bare number, without a set of classes, counts as none.
        labelled = "label" in features and hasattr(features["label"], "names")
        self.classes = tuple(features["label"].names) if labelled else ()
        try:
            parts, count = known[split].file_instructions, known[split].num_examples
        except Exception as error:  # TFDS has no common class for what can be wrong with a slice
            raise DataError(f"{split!r} is no split of {name}: {error}") from error
        if not count:
            raise DataError(f"the split {split!r} of {name} is empty")
        if (told := builder.info.description or "").startswith(DERIVED_PREFIX):
            log.warning("%s is no original: %s", name, told.removeprefix(DERIVED_PREFIX))
        self._records: Any = _records(builder, split, image, index_dir)
        files = [Path(part.filename) for part in parts]
        sizes = [f"{file.name} {file.stat().st_size}" for file in files]
        self._fingerprint = fingerprint_of([name, split, str(len(self)), *sizes])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
        except DataError:
            raise
        except Exception as error:  # of whatever parses it
            raise DataError(f"its record cannot be read: {error}") from error
        label = int(record["label"]) if self.classes else -1
        return {"image": record[self._image], "label": label}

    def label(self, index: int) -> int:
        return self[index]["label"]

    def describe(self, index: int) -> str:
        return f"record {index} of {self.name}/{self.split}"

    def fingerprint(self) -> str:
        return self._fingerprint


def _records(builder: Any, split: str, image: str, index_dir: Path | None) -> Any:
    """Features by record number, the image as bytes where it is encoded."""
    encoded = isinstance(builder.info.features[image], tfds.features.Image)
    decoders: Any = {image: tfds.decode.SkipDecoding()} if encoded else None
    if builder.info.file_format != tfds.core.FileFormat.TFRECORD:
        return builder.as_data_source(split, decoders=decoders)
    counts = {
        Path(path): count
        for info in builder.info.splits.values()
        for path, count in zip(info.filepaths, info.shard_lengths)
    }
    shards = []
    for part in builder.info.splits[split].file_instructions:
        path = Path(part.filename)
        last = counts[path] if part.take == -1 else part.skip + part.take
        shards.append(Shard(path, counts[path], part.skip, last))
    return _Parsed(TfRecords(shards, index_dir), builder.info.features, decoders)


class _Parsed:
    """Records of TFRecord files, parsed as TFDS does it."""

    def __init__(self, records: TfRecords, features: Any, decoders: Any):
        self._records, self._features, self._decoders = records, features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)


def open_builder(name: str, data_dir: str | None) -> Any:
    """The builder of a prepared data set; an embedded one is prepared where that is still to do.

    What lies in the folder counts, not what version this TFDS would prepare.
    """
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except (AssertionError, ValueError) as error:
        raise DataError(f"{name!r} is no name of a data set: {error}") from error
    if name in DEMO_DATASETS:
        return prepare(name, data_dir)
    builder = _registered_builder(name, data_dir)
    advice = f"python -m mae_jax.data prepare {name}"
    raise DataError(
        f"{name} is not prepared in {builder.data_dir}. Set data.path to where it is, or prepare "
        f"it once: {advice} --data-dir DIR"
    )


def prepare(name: str, data_dir: str | None) -> Any:
    """Downloads and prepares a data set as array_record; returns its builder.

    Raises:
      DataError: TFDS does not know it, or needs what is not there.
    """
    if name in DEMO_DATASETS:
        from mae_jax.data import demo_dataset

        builder: Any = demo_dataset.PhotoCrops(data_dir=data_dir, file_format="array_record")
    else:
        builder = _registered_builder(name, data_dir)
    try:
        with _exclusive(Path(builder.data_dir).parent):
            if not builder.is_prepared():
                log.info("preparing %s in %s", name, builder.data_dir)
            # The default format would fail at its very end without TensorFlow.
            builder.download_and_prepare(file_format="array_record")
        if (
            name in DEMO_DATASETS
        ):  # which another process may have prepared since the builder was made
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ImportError as error:
        raise DataError(_needs(name, error)) from error
    except AssertionError as error:  # files that have to be fetched by hand are not there
        raise DataError(str(error)) from error
    return builder


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Waits for others that are preparing the same, which may be processes of one run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _registered_builder(name: str, data_dir: str | None) -> Any:
    """The builder of a data set that TFDS knows how to prepare."""
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        where = data_dir or "TFDS's own folder"
        raise DataError(
            f"TFDS knows no data set called {name!r}, nor is it in {where}, nor is it a folder"
        ) from None
    except ImportError as error:
        raise DataError(_needs(name, error)) from error
    except (AssertionError, ValueError) as error:  # a version or config that does not exist
        raise DataError(f"{name!r} is none of TFDS's: {error}") from error


def _needs(name: str, error: ImportError) -> str:
    """What to say where preparing, but not reading, takes a package that is not installed."""
    return f"preparing {name} takes {error.name}: pip install 'mae_jax[prepare]' ({error})"
