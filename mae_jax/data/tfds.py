"""TFDS datasets as sources, read without TensorFlow from array_record and TFRecord files."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from mae_jax.data.sources import DERIVED_PREFIX, DataError, Record, hash_lines
from mae_jax.data.tfrecord import Shard, TfRecordReader
from mae_jax.utils.caches import cache_folder
from mae_jax.utils.file_lock import exclusive_lock
from mae_jax.utils.paths import expand_path

log = logging.getLogger("mae_jax")

DEMO_DATASETS = {"photo_crops": "PhotoCrops", "photo_mosaics": "PhotoMosaics"}  # builders


class TfdsSource:
    """A split of a TFDS dataset, prepared as array_record or TFRecord.

    Args:
      name: as in "imagenet2012", "cifar10:3.0.2" or "eurosat/all".
      split: as in "train" or "train[:90%]".
      data_dir: where datasets are prepared; None is TFDS's default.
      image_feature: the feature with the image.
      index_dir: where the index of TFRecord files is cached; None caches nothing.

    Raises:
      DataError: the dataset is not prepared, or lacks the split or the feature.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: str | None,
        image_feature: str = "image",
        index_dir: Path | None = None,
    ):
        builder = open_builder(name, data_dir)
        features: Any = builder.info.features
        if image_feature not in features:
            raise DataError(
                f"is not a feature of {name}, which has {', '.join(features)}",
                key="data.image_feature",
                value=image_feature,
            )
        self.name, self.split, self._image_feature = name, split, image_feature
        # An integer feature without class names is not used as a label.
        has_labels = "label" in features and hasattr(features["label"], "names")
        self.classes = tuple(features["label"].names) if has_labels else ()
        # Of a mask whose feature is a LabeledImage.
        self.pixel_classes = tuple(getattr(features[image_feature], "names", None) or ())
        files = _split_files(builder, name, split)
        description = builder.info.description or ""
        if description.startswith(DERIVED_PREFIX):
            changes = description.removeprefix(DERIVED_PREFIX)
            log.warning("%s differs from the original dataset: %s", name, changes)
        self._records: Any = _open_records(builder, split, image_feature, index_dir)
        sizes = [f"{file.name} {file.stat().st_size}" for file in files]
        self._fingerprint = hash_lines([name, split, str(len(self)), *sizes])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
        except DataError:
            raise
        except Exception as error:  # parsers raise all kinds of errors for corrupt data
            raise DataError(f"its record cannot be read: {error}") from error
        label = int(record["label"]) if self.classes else -1
        return {"image": record[self._image_feature], "label": label}

    def label(self, index: int) -> int:
        return self[index]["label"]

    def describe(self, index: int) -> str:
        return f"record {index} of {self.name}/{self.split}"

    def fingerprint(self) -> str:
        return self._fingerprint


def _split_files(builder: Any, name: str, split: str) -> list[Path]:
    """Return the files of a split.

    Raises:
      DataError: there is no such split, or it is empty.
    """
    splits: Any = builder.info.splits
    if split.isidentifier() and split not in splits:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits) or 'none'}")
    try:
        parts, count = splits[split].file_instructions, splits[split].num_examples
    except Exception as error:  # TFDS raises all kinds of errors for an invalid slice
        raise DataError(f"{split!r} is not a split of {name}: {error}") from error
    if not count:
        raise DataError(f"the split {split!r} of {name} is empty")
    return [Path(part.filename) for part in parts]


def _open_records(builder: Any, split: str, image_feature: str, index_dir: Path | None) -> Any:
    """Return the features by record index, with an encoded image as bytes."""
    encoded = isinstance(builder.info.features[image_feature], tfds.features.Image)
    decoders: Any = {image_feature: tfds.decode.SkipDecoding()} if encoded else None
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
    return _ParsedRecords(TfRecordReader(shards, index_dir), builder.info.features, decoders)


class _ParsedRecords:
    """Records of TFRecord files, parsed by TFDS."""

    def __init__(self, records: TfRecordReader, features: Any, decoders: Any):
        self._records, self._features, self._decoders = records, features, decoders

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)


def open_builder(name: str, data_dir: str | None) -> Any:
    """Return the builder of a prepared dataset; a demo dataset is prepared if necessary.

    The version is the one on disk, not the one that this TFDS would prepare.

    Raises:
      DataError: the name is invalid or unknown, or the dataset is not prepared.
    """
    data_dir = data_dir or _default_data_dir()
    try:
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        pass
    except (AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]  # the others explain the format of names
        raise DataError(f"{name!r} is not a dataset name: {reason}") from error
    if name in DEMO_DATASETS:
        return prepare(name, data_dir)
    builder = _registered_builder(name, data_dir)
    command = f"mae-jax data prepare {name}"
    raise DataError(
        f"{name} is not prepared in {builder.data_dir}. Set data.path to its directory, or prepare "
        f"it once: {command} --data-dir DIR"
    )


def prepare(name: str, data_dir: str | None) -> Any:
    """Download a dataset and prepare it as array_record; return its builder.

    Raises:
      DataError: TFDS does not know it, or a package or a manual download is missing.
    """
    data_dir = data_dir or _default_data_dir()
    if name in DEMO_DATASETS:
        from mae_jax.data import demo_dataset

        make_builder = getattr(demo_dataset, DEMO_DATASETS[name])
        builder: Any = make_builder(data_dir=data_dir, file_format="array_record")
    else:
        builder = _registered_builder(name, data_dir)
    try:
        with _exclusive(Path(builder.data_dir).parent):
            if not builder.is_prepared():
                log.info("preparing %s in %s", name, builder.data_dir)
            # The default format would fail at the end without TensorFlow.
            builder.download_and_prepare(file_format="array_record")
        if name in DEMO_DATASETS:  # another process may have prepared it meanwhile
            return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except ImportError as error:
        raise _missing_package(name, error) from error
    except AssertionError as error:  # a manual download is missing
        raise DataError(str(error)) from error
    return builder


def _default_data_dir() -> str | None:
    """Return the folder of TFDS_DATA_DIR, or one for a user without a home; None is TFDS's default.

    Raises:
      UserError: it is an address such as gs://bucket.
    """
    if folder := os.environ.get("TFDS_DATA_DIR"):
        return expand_path(folder)
    if os.path.expanduser("~") != "~":
        return None
    temporary = cache_folder("tensorflow_datasets")
    return str(temporary) if temporary else None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold a file lock, since several processes of a run may prepare the same dataset."""
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / ".lock", wait=True):
        yield


def _registered_builder(name: str, data_dir: str | None) -> Any:
    """Return the builder of a dataset that TFDS can prepare."""
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.registered.DatasetNotFoundError:
        where = data_dir or "the default TFDS directory"
        raise DataError(
            f"no dataset {name!r}: TFDS does not know it, and it is neither in {where} nor a folder"
        ) from None
    except ImportError as error:
        raise _missing_package(name, error) from error
    except (AssertionError, ValueError) as error:  # an unknown version or config
        reason = str(error).splitlines()[0]
        raise DataError(f"{name!r} is not a TFDS dataset: {reason}") from error


def _missing_package(name: str, error: ImportError) -> DataError:
    """Return the error for a package that preparing needs, but reading does not."""
    extra = "demo" if name in DEMO_DATASETS else "prepare"
    return DataError(
        f"preparing {name} needs {error.name}: pip install 'mae_jax[{extra}]' ({error})"
    )
