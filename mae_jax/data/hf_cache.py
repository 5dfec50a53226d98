"""Datasets in the cache of huggingface `datasets`: folders of Arrow files."""

import json
import os
from pathlib import Path

from mae_jax.data.sources import DataError


def find_cached(name: str, split: str, cache_dir: str | None) -> list[Path]:
    """Return the Arrow files of a split of a dataset in the cache of huggingface `datasets`.

    Args:
      name: as for `load_dataset`, "org/name", with ":config" if there are several configs.
      cache_dir: None is $HF_DATASETS_CACHE, $HF_HOME/datasets or ~/.cache/huggingface/datasets.

    Raises:
      DataError: it is not there, has several configs, or no such split.
    """
    folder = _cached_folder(name, cache_dir)
    files = [
        *folder.glob(f"*-{split}.arrow"),
        *folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.arrow"),
    ]
    files = sorted(file for file in files if not file.name.startswith("cache-"))
    if not files:
        splits = ", ".join(cached_splits(name, cache_dir))
        raise DataError(f"{name} has no split {split!r}; it has {splits or 'none'}")
    return files


def cached_splits(name: str, cache_dir: str | None) -> list[str]:
    """Return the names of the splits of a dataset as in `find_cached`."""
    info = json.loads((_cached_folder(name, cache_dir) / "dataset_info.json").read_text())
    return list(info.get("splits") or {})


def _default_cache() -> Path:
    if path := os.environ.get("HF_DATASETS_CACHE"):
        return Path(path).expanduser()
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "datasets"


def _cached_folder(name: str, cache_dir: str | None) -> Path:
    """Return the folder of the newest version of a cached dataset."""
    cache = Path(cache_dir) if cache_dir else _default_cache()
    dataset, _, config = name.partition(":")
    plain = lambda text: text.replace("/", "___").replace("_", "").lower()
    folders = [x for x in cache.glob("*") if x.is_dir() and plain(x.name) == plain(dataset)]
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for info in sorted(folder.glob("*/**/dataset_info.json")):
            if not info.parent.name.endswith(".incomplete"):
                found.setdefault(info.relative_to(folder).parts[0], []).append(info)
    if not found:
        raise DataError(
            f"is not in {cache}: load it once with datasets.load_dataset, or give the folder of "
            "the cache as data.path",
            key="data.name",
            value=name,
        )
    if config not in found and (config or len(found) > 1):
        known = ", ".join(f"{dataset}:{other}" for other in found)
        raise DataError(f"is one of several configs: {known}", key="data.name", value=name)
    infos = found[config] if config else next(iter(found.values()))
    return max(infos, key=lambda info: info.stat().st_mtime).parent
