"""The text that names a checkpoint: a path or address, an official file, a model of the hub."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from mae_jax.convert import hub, store
from mae_jax.convert.model_info import ConvertError
from mae_jax.convert.official import OFFICIAL_FILES, find
from mae_jax.convert.weight_files import SUFFIXES
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path, is_address


@dataclass(frozen=True)
class Located:
    """A checkpoint on this machine.

    revision: commit hash of a model of the hub; "" of other files.
    """

    path: Path
    revision: str = ""


def checkpoint_text(text: str | os.PathLike[str]) -> str:
    """Return the text that names a checkpoint, with "~" expanded if it is a path.

    Raises:
      UserError: it is an address of anything but the hub (hf://) or an object store.
    """
    text = os.fspath(text)
    return text if hub.is_address(text) else expand_path(text, remote=True)


def checkpoint_argument(text: str) -> str:
    """Parse the flag or argument of a command that names a checkpoint."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the checkpoint is empty")
    try:
        return checkpoint_text(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def locate(text: str | os.PathLike[str], revision: str = "") -> Located:
    """Return where the named checkpoint is on this machine, downloading one of hub or store.

    An existing path comes first, then the names of official files, with or without ".pth", then
    models of the hub.

    Args:
      revision: commit hash of a model of the hub to read, whatever the text names.

    Raises:
      ConvertError: there is nothing of that name; says what was tried.
      UserError: it is an address of anything else, or cannot be read.
    """
    text = checkpoint_text(text)
    if is_address(text) and not hub.is_address(text):
        return Located(store.fetch(text))
    if not hub.is_address(text) and os.path.lexists(text):
        return Located(Path(text))
    if official := OFFICIAL_FILES.get(text.removesuffix(".pth")):
        return Located(*find(official, revision))
    name = hub.parse_name(text)
    if name is None:
        raise ConvertError(_no_such_path(text))
    if revision:
        name = hub.HubName(name.repo, revision, name.file)
    return Located(*hub.fetch(name))


def _no_such_path(text: str) -> str:
    known = OFFICIAL_FILES.get(Path(text).name.removesuffix(".pth"))
    if known:
        return f"{text} does not exist; the name {known.name}, without a folder, finds it in caches"
    if text.lower().endswith(SUFFIXES):
        return f"{text} does not exist"
    return f"{text} does not exist; a model of the Hugging Face hub is named as org/name"
