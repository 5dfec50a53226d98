"""The checkpoint files of facebookresearch/mae: where they are published, and found locally."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mae_jax.convert import hub
from mae_jax.convert.model_info import ConvertError
from mae_jax.utils.caches import cache_folder

log = logging.getLogger("mae_jax")

_BASE = "https://dl.fbaipublicfiles.com/mae"


@dataclass(frozen=True)
class OfficialFile:
    """A published file.

    md5: first digits of its MD5, as its publishers give them; "" if they do not.
    hub: the model of the Hugging Face hub with the same weights; "" if there is none.
    """

    url: str
    md5: str = ""
    hub: str = ""

    @property
    def name(self) -> str:
        """Return the name without ".pth"."""
        return self.url.rpartition("/")[2].removesuffix(".pth")


_FILES = [
    # README.md and FINETUNE.md of facebookresearch/mae, and for the decoders its issues 3 and 8.
    OfficialFile(
        f"{_BASE}/pretrain/mae_pretrain_vit_base.pth", "8cad7c", "timm/vit_base_patch16_224.mae"
    ),
    OfficialFile(
        f"{_BASE}/pretrain/mae_pretrain_vit_large.pth", "b8b06e", "timm/vit_large_patch16_224.mae"
    ),
    OfficialFile(
        f"{_BASE}/pretrain/mae_pretrain_vit_huge.pth", "9bdbb0", "timm/vit_huge_patch14_224.mae"
    ),
    OfficialFile(f"{_BASE}/pretrain/mae_pretrain_vit_base_full.pth"),
    OfficialFile(f"{_BASE}/pretrain/mae_pretrain_vit_large_full.pth"),
    OfficialFile(f"{_BASE}/pretrain/mae_pretrain_vit_huge_full.pth"),
    OfficialFile(f"{_BASE}/visualize/mae_visualize_vit_base.pth", hub="facebook/vit-mae-base"),
    OfficialFile(f"{_BASE}/visualize/mae_visualize_vit_large.pth", hub="facebook/vit-mae-large"),
    OfficialFile(f"{_BASE}/visualize/mae_visualize_vit_huge.pth", hub="facebook/vit-mae-huge"),
    OfficialFile(f"{_BASE}/visualize/mae_visualize_vit_large_ganloss.pth"),
    OfficialFile(f"{_BASE}/finetune/mae_finetuned_vit_base.pth", "1b25e9"),
    OfficialFile(f"{_BASE}/finetune/mae_finetuned_vit_large.pth", "51f550"),
    OfficialFile(f"{_BASE}/finetune/mae_finetuned_vit_huge.pth", "2541f2"),
]
OFFICIAL_FILES = {file.name: file for file in _FILES}


def find(file: OfficialFile, revision: str = "") -> tuple[Path, str]:
    """Return the path of an official file on this machine, or of the same weights on the hub.

    Args:
      revision: of the model of the hub; its latest by default.

    Returns:
      The path, and the revision if it is a model of the hub, else "".

    Raises:
      ConvertError: says where it was looked for, and which file belongs where.
    """
    tried = []
    for folder in _folders():
        for path in _candidates(folder, file.name):
            problem = _hash_problem(path)
            if problem is None:
                _check_md5(file, path)
                log.info("%s is %s", file.name, path)
                return path, ""
            tried.append(f"{path}: {problem}")
        tried.append(f"{folder}: no {file.name}.pth")
    if file.hub:
        try:
            found = hub.fetch(hub.HubName(file.hub, revision or "main"))
        except ConvertError as error:
            tried.append(str(error))
        else:
            log.warning(
                "%s.pth is not on this machine: %s of the Hugging Face hub has the same weights, "
                "and its own image preprocessing and layer_norm_eps",
                file.name,
                file.hub,
            )
            return found
    raise ConvertError(_not_found(file, tried))


def _folders() -> Iterator[Path]:
    """Yield the folders to look in: our cache, and that of torch.hub."""
    if ours := cache_folder("."):
        yield ours
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    torch_home = os.environ.get("TORCH_HOME") or f"{caches}/torch"
    yield Path(os.path.expanduser(torch_home), "hub", "checkpoints")


def _candidates(folder: Path, name: str) -> list[Path]:
    """Return the files NAME.pth and NAME-HASH.pth, which torch.hub writes."""
    pattern = re.compile(rf"{name}(-[0-9a-f]{{8,64}})?\.pth")
    return sorted(path for path in folder.glob(f"{name}*.pth") if pattern.fullmatch(path.name))


def _hash_problem(path: Path) -> str | None:
    """Return why a file does not have the SHA-256 in its name; None if it has, or has no hash."""
    expected = path.stem.rpartition("-")[2] if "-" in path.stem else ""
    actual = _digest(path, "sha256") if expected else ""
    if actual.startswith(expected):
        return None
    return f"its SHA-256 begins with {actual[: len(expected)]}, so it is not the file of its name"


def _check_md5(file: OfficialFile, path: Path) -> None:
    actual = _digest(path, "md5") if file.md5 else ""
    if not actual.startswith(file.md5):
        log.warning(
            "%s is not the published file: its MD5 begins with %s, not %s",
            path,
            actual[: len(file.md5)],
            file.md5,
        )


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _not_found(file: OfficialFile, tried: list[str]) -> str:
    folder = next(_folders())
    check = f", whose MD5 begins with {file.md5}" if file.md5 else ""
    looked = "".join(f"\n  {line}" for line in tried)
    return (
        f"{file.name} is not on this machine. Download the official file{check}:\n"
        f"  curl -L --create-dirs -o {folder}/{file.name}.pth {file.url}\n"
        f"It was looked for here:{looked}"
    )
