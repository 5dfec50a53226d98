"""Models of the Hugging Face hub: their names, and the files of them that are read.

The only module that imports huggingface_hub, and only on use. It honors HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from mae_jax.convert import torch_io
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.torch_io import first_line
from mae_jax.convert.weight_files import SUFFIXES, choose_weights, is_self_describing
from mae_jax.utils.caches import cache_folder

log = logging.getLogger("mae_jax")

CONFIGS = ("config.json", "preprocessor_config.json")
OPTIONAL_CONFIGS = ("processor_config.json",)  # of few models; not asked for unless listed
TIMEOUT_S = 10.0  # of the first request, after which the hub is out of reach

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"  # of org/name
_SHORT = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>\S+))?")
_ADDRESS = re.compile(  # pathlib turns hf://x into hf:/x
    rf"hf://?(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/[^/\s]+|[^/\s]+))?(?:/(?P<file>[^\s]+?))?/?"
)


@dataclass(frozen=True)
class HubName:
    """A model of the hub, at a revision; `file` is one weights file of it, or a folder, or ""."""

    repo: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"

    @property
    def folder(self) -> str:
        """Return the folder of the files in the repository; "" for its top."""
        folder, is_file = self.file, self.file.lower().endswith(SUFFIXES)
        return folder.rpartition("/")[0] if is_file else folder

    @property
    def weights(self) -> str:
        """Return the name of the weights file in the folder; "" if it is not given."""
        return self.file.removeprefix(self.folder).lstrip("/")

    @property
    def command(self) -> str:
        """Return the command that fetches it into the cache of the hub."""
        words = ["hf", "download", self.repo, *([self.file] if self.weights else [])]
        words += ["--revision", self.revision] if self.revision != "main" else []
        return shlex.join(words)


def is_address(text: str) -> bool:
    """Return whether a text begins with hf://, which pathlib turns into hf:/."""
    return text.startswith("hf:/")


def parse_name(text: str) -> HubName | None:
    """Parse org/name, org/name@revision or hf://org/name[@revision][/file]; None for other text.

    Text of the first two forms whose name ends as a weights file is a path, not a model.

    Raises:
      ConvertError: it begins with hf://, but names no model.
    """
    match = (_ADDRESS if is_address(text) else _SHORT).fullmatch(text)
    unnatural = match and ("--" in match["repo"] or ".." in match["repo"])  # refused by the hub
    if is_address(text) and (
        match is None or unnatural or re.match("hf:/+(datasets|spaces)/", text)
    ):
        raise ConvertError(
            f"{text} names no model: write hf://org/name, hf://org/name@revision or "
            "hf://org/name/file.safetensors"
        )
    if match is None or unnatural or match["repo"].lower().endswith(SUFFIXES):
        return None
    revision = unquote(match["revision"] or "main")
    return HubName(match["repo"], revision, match.groupdict().get("file") or "")


def fetch(name: HubName) -> tuple[Path, str]:
    """Return the local path of a model, and the commit hash of its revision.

    What the cache holds is used without asking the hub. The rest is downloaded: the weights, as
    safetensors if there are any, config.json and preprocessor_config.json.

    Raises:
      ConvertError: it is neither in the cache nor can it be fetched; has the command to do so.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConvertError(
            f"{name} is not on this machine, and to read it from the Hugging Face hub needs "
            f"huggingface_hub: pip install 'mae_jax[hub]' && {name.command}"
        )
    _set_cache()
    cached = _cached_snapshot(name)
    if cached is None or not cached.is_complete:
        try:
            cached = _download(name)
        except ConvertError:
            if cached is None or cached.missing_weights:
                raise
            if cached.missing_configs:
                _warn_missing_configs(cached)
    return cached.folder / name.weights, cached.revision


def _warn_missing_configs(cached: "_Snapshot") -> None:
    files = [_join(cached.name.folder, file) for file in cached.missing_configs]
    log.warning(
        "%s is read without %s, which the cache of the hub lacks; if the model has them: %s",
        cached.name,
        ", ".join(files),
        " ".join([cached.name.command, *files]),
    )


@dataclass(frozen=True)
class _Snapshot:
    """The files of a revision in the cache, some of which may be missing."""

    name: HubName
    path: Path

    @property
    def revision(self) -> str:
        """Return the commit hash."""
        return self.path.name

    @property
    def folder(self) -> Path:
        return self.path / self.name.folder

    @property
    def files(self) -> list[str]:
        """Return the names of the files in the folder; links to lost blobs are none."""
        return [path.name for path in self.folder.glob("*") if path.is_file()]

    @property
    def weights(self) -> str | None:
        """Return the name of the file to read, or of the index of its shards."""
        return self.name.weights or choose_weights(self.files)

    @property
    def missing_weights(self) -> list[str]:
        """Return the files to read that are missing; ["weights"] if there are none at all."""
        files, weights = self.files, self.weights
        if weights not in files:
            return [weights or "weights"]
        return [shard for shard in self.shards() if shard not in files]

    def shards(self) -> list[str]:
        """Return the names of the files that the index lists; [] without an index."""
        if not self.weights or not self.weights.endswith(".json"):
            return []
        try:
            index = json.loads((self.folder / self.weights).read_text())
            return sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ConvertError(f"{self.name}: {self.weights} has no weight_map") from error

    @property
    def missing_configs(self) -> list[str]:
        """Return the config files that the repository may have, but the cache does not."""
        if self.name.weights or is_self_describing(self.folder / (self.weights or "")):
            return []
        config = self.folder / "config.json"
        is_timm = config.is_file() and b'"architecture"' in config.read_bytes()
        return [file for file in CONFIGS[: 1 if is_timm else 2] if not self._is_known(file)]

    def _is_known(self, file: str) -> bool:
        """Return whether the cache has a file, or knows that the repository has not."""
        import huggingface_hub

        path, repo = _join(self.name.folder, file), self.name.repo
        return (
            huggingface_hub.try_to_load_from_cache(repo, path, revision=self.revision) is not None
        )

    @property
    def is_complete(self) -> bool:
        """Return whether all that is read is here, of which no file is a pickle."""
        if self.missing_weights or self.missing_configs:
            return False
        return bool(self.name.weights) or ".safetensors" in str(self.weights)


def _join(folder: str, file: str) -> str:
    return f"{folder}/{file}" if folder else file


def _set_cache() -> None:
    """Use a temporary folder for the cache where the home directory is unknown."""
    variables = {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"}
    if os.path.expanduser("~") == "~" and not variables & os.environ.keys():
        folder = cache_folder("huggingface")
        if folder:
            os.environ["HF_HOME"] = str(folder)


def _cached_snapshot(name: HubName) -> _Snapshot | None:
    """Return what the cache has of a revision."""
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except (OSError, ValueError):  # it is not in the cache, or the hub allows no such name
        return None
    return _Snapshot(name, Path(path))


def _download(name: HubName) -> _Snapshot:
    """Download what is read of a revision."""
    prefix = _join(name.folder, "")
    paths = [path for path in _list_files(name) if path.startswith(prefix)]
    files = [path.removeprefix(prefix) for path in paths if "/" not in path.removeprefix(prefix)]
    safetensors = [file for file in files if ".safetensors" in file]
    weights = name.weights or choose_weights(safetensors or files)
    if weights not in files:
        listed = [file for file in files if file.lower().endswith(SUFFIXES)]
        choice = f": choose one, as hf://{name}/{_join(name.folder, listed[0])}" if listed else ""
        raise ConvertError(
            f"{name} on the Hugging Face hub has {len(listed) or 'no'} weights files, and no "
            f"{weights or 'model.safetensors'}{choice}"
        )
    if ".safetensors" not in weights:
        torch_io.require_torch()  # before hundreds of megabytes are downloaded
    configs = () if name.weights else CONFIGS
    wanted = (*configs, *OPTIONAL_CONFIGS) if configs else ()
    snapshot = _download_files(name, [weights, *(file for file in wanted if file in files)])
    if shards := snapshot.shards():
        _download_files(dataclasses.replace(name, revision=snapshot.revision), shards)
    _note_absent(snapshot, [file for file in configs if file not in files])
    return snapshot


def _list_files(name: HubName) -> list[str]:
    """Return the names of all files of a revision; the first request to the hub."""
    import huggingface_hub

    with _hub_errors(name):
        info = huggingface_hub.HfApi().model_info(
            name.repo, revision=name.revision, timeout=TIMEOUT_S
        )
    return [file.rfilename for file in info.siblings or []]


def _download_files(name: HubName, files: list[str]) -> _Snapshot:
    """Download files of the folder, with progress bars; what the cache has is not downloaded."""
    import huggingface_hub

    with _hub_errors(name):
        paths = [_join(name.folder, glob.escape(file)) for file in files]
        path = huggingface_hub.snapshot_download(
            name.repo, revision=name.revision, allow_patterns=paths
        )
    return _Snapshot(name, Path(path))


def _note_absent(snapshot: _Snapshot, files: list[str]) -> None:
    """Request files that do not exist, of which the cache then takes a note."""
    import huggingface_hub

    for file in files:
        path = _join(snapshot.name.folder, file)
        with contextlib.suppress(OSError, huggingface_hub.errors.EntryNotFoundError):
            huggingface_hub.hf_hub_download(snapshot.name.repo, path, revision=snapshot.revision)


@contextmanager
def _hub_errors(name: HubName) -> Iterator[None]:
    """Raise ConvertError with the remedy for every error of huggingface_hub."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ConvertError(
            f"{name} on the Hugging Face hub is gated: accept its terms there, then hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ConvertError(
            f"{name} is neither on this machine nor on the Hugging Face hub; if it is private: hf "
            "auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConvertError(
            f"{name.repo} on the Hugging Face hub has no revision {name.revision}"
        ) from error
    except Exception as error:  # the HTTP library, and with it the types, differ between versions
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else first_line(error)
        raise ConvertError(
            f"{name} is not on this machine, and the Hugging Face hub is out of reach ({reason}): "
            f"fetch it where there is a network with {name.command}"
        ) from error
