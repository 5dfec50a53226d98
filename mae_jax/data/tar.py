"""Tar files of images (WebDataset), read by index without unpacking them.

The members "a/0001.jpg" and "a/0001.cls" are the image and the label of the sample "a/0001": a name
ends at the first dot of its last part. The tars are indexed once; see `Shards`.
"""

import hashlib
import json
import logging
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_jax.data.shard_files import FileKind
from mae_jax.data.shard_index import Index, Shards
from mae_jax.data.sources import MAX_CLASSES, SUFFIXES, DataError, Record, printable_path
from mae_jax.utils.remote import AnyPath, RemoteError

log = logging.getLogger("mae_jax")

TARS = FileKind("tar files", (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
LABEL_KEYS = ("label", "cls")  # in .json members
LABEL_RANKS = {"cls": 0, "json": 1, "txt": 2}  # suffixes of labels, in order of preference
COMPRESSED = {  # first bytes -> the program that unpacks such files
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
MEMBER, DATA, SIZE, LABEL, NAME = range(5)  # columns of an index
BLOCK = 512  # bytes of a header


class TarSource:
    """The images of tar files, in their order.

    Labels are integers in .cls members, in .json members under "label" or "cls", or in .txt members
    (captions are no labels). The names of the classes are the lines of classes.txt beside the first
    tar file, or else numbers.

    Args:
      files: in order.
      classes: of the training split.
      index_dir: where the indices are cached; None caches nothing.
      image: suffix of the image members, as "left.png"; "image" takes any image.

    Raises:
      DataError: a file is missing, compressed, truncated or not a tar file; a label is not an
        integer or has no class; or there are no images.
    """

    def __init__(
        self,
        files: Sequence[AnyPath],
        classes: tuple[str, ...] = (),
        index_dir: Path | None = None,
        image: str = "image",
    ):
        self._shards = Shards(files, TARS.name)
        index_file = lambda number: _index_tar(files[number], image)
        indices = self._shards.indices(index_file, index_dir, [image])
        self._file = np.repeat(np.arange(len(indices)), [len(rows) for rows in indices])
        self._index = np.concatenate(indices)
        if not len(self._index):
            raise DataError(f"no images in {files[0]}{_and_more(files)}")
        self.classes = self._class_names(files[0].parent / "classes.txt", classes)

    def _class_names(self, file: AnyPath, classes: tuple[str, ...]) -> tuple[str, ...]:
        labels = self._index[:, LABEL]
        highest = int(labels.max())
        if highest < 0:
            return ()
        names = classes
        if not names and file.exists():
            names = tuple(file.read_text().splitlines())
        names = names or tuple(map(str, range(highest + 1)))
        if highest >= len(names):
            first = int(np.flatnonzero(labels == highest)[0])
            raise DataError(
                f"{self.describe(first)} has label {highest}, but there are {len(names)} classes: "
                f"name all of them in {file}, one per line"
            )
        return names

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        row = self._index[index]
        image = self._shards.read(int(self._file[index]), int(row[DATA]), int(row[SIZE]))
        return {"image": image, "label": int(row[LABEL])}

    def label(self, index: int) -> int:
        return int(self._index[index, LABEL])

    def describe(self, index: int) -> str:
        path, offset = self._shards.paths[self._file[index]], int(self._index[index, MEMBER])
        try:
            with path.open("rb", buffering=2 * BLOCK) as file:
                file.seek(offset)
                member = tarfile.open(fileobj=file, mode="r:").next()  # noqa: SIM115
            name = member.name if member else f"member at byte {offset}"
        except (OSError, tarfile.TarError):
            name = f"member at byte {offset}"
        return printable_path(path / name)

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and labels of all images."""
        columns = np.ascontiguousarray(self._index[:, [SIZE, LABEL, NAME]])
        return hashlib.sha256(columns.data).hexdigest()[:16]


def _and_more(files: Sequence[AnyPath]) -> str:
    return f" and {len(files) - 1} more tar files" if len(files) > 1 else ""


@dataclass
class _Sample:
    """A sample of a tar file: its image member, the rank of its label's suffix, and the label."""

    image: tarfile.TarInfo | None = None
    suffix: str = ""
    rank: int = len(LABEL_RANKS)
    label: int = -1


def _index_tar(path: AnyPath, image: str) -> Index:
    """Return the place, size, label and hash of the name of every image of a tar file."""
    samples: dict[str, _Sample] = {}
    has_captions = False  # so that numbers in .txt members are no labels
    try:
        with path.open("rb") as file:
            _check_kind(path, file.read(BLOCK))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in _members(tar, path):
                    key, suffix = _split_name(member.name)
                    sample = samples.setdefault(key, _Sample())
                    rank = LABEL_RANKS.get(suffix, sample.rank)
                    if _is_image(suffix, image):
                        _take_image(path, sample, member, suffix)
                    elif rank < sample.rank and not (suffix == "txt" and has_captions):
                        opened = tar.extractfile(member)
                        assert opened is not None
                        label = _read_label(path, member, suffix, opened.read())
                        if label is not None:
                            sample.rank, sample.label = rank, label
                        has_captions |= suffix == "txt" and label is None
    except RemoteError:
        raise
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is damaged, cut off, or not a tar file: {error}") from error
    if has_captions:
        for sample in samples.values():
            sample.label = -1 if sample.rank == LABEL_RANKS["txt"] else sample.label
    if without := sum(sample.image is None for sample in samples.values()):
        log.warning("ignored: %d samples of %s have no image", without, path)
    rows = [
        (x.image.offset, x.image.offset_data, x.image.size, x.label, _hash(x.image.name))
        for x in samples.values()
        if x.image is not None
    ]
    return np.array(rows, np.int64).reshape(-1, 5)


def _check_kind(path: AnyPath, begin: bytes) -> None:
    for magic, program in COMPRESSED.items():
        if begin.startswith(magic):
            file = str(path) if isinstance(path, Path) else path.name  # to be copied first
            unpacked = file.removesuffix(path.suffix)
            if not unpacked.endswith(".tar"):  # .tgz, or a compressed file that is named .tar
                unpacked += ".plain.tar" if path.suffix == ".tar" else ".tar"
            packed = shlex.quote(file)
            command = f"{program} -c {packed} > {shlex.quote(unpacked)} && rm {packed}"
            raise DataError(
                f"{path} is compressed, so its images cannot be read in any order: unpack it with "
                f"{command}"
            )
    if not begin:
        raise DataError(f"{path} is empty")


def _members(tar: tarfile.TarFile, path: AnyPath) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar file, without hidden ones.

    Raises:
      DataError: the tar file ends within a member, or is damaged.
    """
    size, ignored = path.stat().st_size, []
    while member := tar.next():
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (else all stay in memory)
        if member.issym() or member.islnk() or member.issparse():
            ignored.append(member.name)
            continue
        if member.offset_data + member.size > size:
            raise DataError(f"{path} is cut off within {member.name}: copy it again")
        if member.isreg() and not member.name.rsplit("/")[-1].startswith("."):
            yield member
    # At a bad header, as at the end, there is no next member.
    with path.open("rb", buffering=BLOCK) as file:
        file.seek(tar.offset)
        end = file.read(BLOCK)
        has_more = any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b""))
    if any(end) or 0 < len(end) < BLOCK:
        raise DataError(f"{path} is damaged or cut off at byte {tar.offset}: copy it again")
    if has_more:
        raise DataError(
            f"{path} goes on after an end mark at byte {tar.offset}: it is damaged, or several tar "
            "files were joined by cat"
        )
    if ignored:
        log.warning(
            "ignored: %d links or sparse files of %s, as %s (write it with tar --hard-dereference "
            "--dereference, without --sparse)",
            len(ignored),
            path,
            ignored[0],
        )
    if not end:
        log.warning("%s has no end mark: if it was cut off, images are missing", path)


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _is_image(suffix: str, image: str) -> bool:
    if image != "image":
        return suffix == image.lower()
    return "." + suffix.rsplit(".")[-1] in SUFFIXES


def _take_image(path: AnyPath, sample: _Sample, member: tarfile.TarInfo, suffix: str) -> None:
    """Make a member the image of its sample: "jpg" goes before "mask.png".

    Raises:
      DataError: it has two.
    """
    if sample.image is not None and sample.image.name == member.name:
        raise DataError(f"{path} has two members {member.name}: write it again with one")
    if sample.image is not None and ("." in suffix) == ("." in sample.suffix):
        raise DataError(
            f"{path} has two images of one sample, {sample.image.name} and {member.name}: name the "
            f"suffix of the ones to read, as in data.image_feature={suffix}"
        )
    if sample.image is None or "." not in suffix:
        sample.image, sample.suffix = member, suffix


def _read_label(path: AnyPath, member: tarfile.TarInfo, suffix: str, data: bytes) -> int | None:
    """Return the label in a member, or None if it has none.

    Raises:
      DataError: a .cls member is not an integer.
    """
    text = data.decode("utf-8", "replace").strip()
    if suffix == "json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return None
        found = (
            [values[key] for key in LABEL_KEYS if key in values] if isinstance(values, dict) else []
        )
        return next((x for x in found if type(x) is int and 0 <= x < MAX_CLASSES), None)
    if text.isdecimal() and len(text) < 20 and int(text) < MAX_CLASSES:
        return int(text)
    if suffix == "cls":
        raise DataError(
            f"{path}: {member.name} is {text[:40]!r}, but .cls has the number of a class, from 0 "
            f"to {MAX_CLASSES - 1}"
        )
    return None


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
