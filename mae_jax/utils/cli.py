"""Command-line plumbing that all commands share: argument types, output paths, exit codes."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from mae_jax.utils import console
from mae_jax.utils.atomic import check_writable
from mae_jax.utils.compilation import enable_compilation_cache
from mae_jax.utils.errors import UserError
from mae_jax.utils.paths import expand_path

# Flags by the config key that they correspond to: errors name the flag instead of the key.
FLAGS = {
    "mask.ratio": "--mask-ratio",
    "mask.kind": "--mask",
    "model.image_size": "--image-size",
    "model.channels": "--channels",
    "eval.show_channels": "--show",
    "data.image_feature": "--image-feature",
    "data.nodata": "--nodata",
    "data.bands": "--bands",
    "data.dicom_window": "--dicom-window",
    "data.path": "--data-dir",
    "data.shots": "--shots",
    "segment.mask_feature": "--mask-feature",
}


def path_argument(text: str) -> Path:
    """Parse a path on this machine; "~" is expanded, gs:// and the like are refused."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """Parse a path as `path_argument` does, but as text, which may name a dataset instead."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return _expand(text, remote=False)


def dataset_text(text: str) -> str:
    """Parse a path, or the name of a dataset; addresses of object stores are allowed."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the dataset is empty")
    return _expand(text, remote=True)


def _expand(text: str, *, remote: bool) -> str:
    try:
        return expand_path(text, remote=remote)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive_int(text: str) -> int:
    """Parse an integer >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 1")
    return int(text)


def uint32(text: str) -> int:
    """Parse an integer from 0 to 2^32 - 1, as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to {2**32 - 1}")
    return int(text)


def int_pair(text: str) -> tuple[int, int]:
    """Parse "224" or "224,160" as height and width, or rows and columns."""
    numbers = int_list(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one integer nor two")
    return numbers[0], numbers[-1]


def int_list(text: str) -> list[int]:
    """Parse "3,6,9" as a list of integers >= 1."""
    return [positive_int(part) for part in text.split(",")]


def index_list(text: str) -> list[int]:
    """Parse "3,2,1" as a list of integers >= 0."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers >= 0")
    return [int(part) for part in parts]


def fraction(text: str) -> float:
    """Parse a number above 0 and at most 1, as a probability."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return number


def positive_float(text: str) -> float:
    """Parse a finite number > 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")
    return number


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser described by the first line of a module's docstring.

    Its errors name the program that the user typed: `mae-jax NAME` or `python -m MODULE`.
    """
    program = sys.argv[0] if sys.argv[0].startswith("mae-jax ") else f"python -m {module}"
    description = str(doc).splitlines()[0]
    return argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)


def check_output(flag: str, path: Path, *suffixes: str) -> None:
    """Raise UserError, before any work is done, unless a file of that name can be written."""
    if path.suffix not in suffixes:
        raise UserError(f"{flag} {path} must end in {' or '.join(suffixes)}")
    check_writable(flag, path)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a directory")


def pluralize(count: int, noun: str) -> str:
    """Return "1 image", "2 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a command; bad input prints one sentence and exits with code 2."""
    console.setup_logging()
    enable_compilation_cache()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that partial output is removed
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error.as_flag(FLAGS)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("error: out of memory", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
