"""What the flags of several benchmarks are checked for."""

import argparse
import math
import os


def check_positive(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with the parser's error for numbers that are not above 0."""
    for name, value in vars(arguments).items():
        if type(value) in (int, float) and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')}={value} must be above 0")


def check_image_size(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, patch: int
) -> None:
    """Ends with the parser's error for images that patches do not divide."""
    if arguments.image_size % patch:
        parser.error(f"--image-size={arguments.image_size} must be a multiple of {patch}, a patch")


def check_json(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with the parser's error, before any work, where --json cannot be written."""
    if arguments.json is None:
        return
    folder = arguments.json.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        parser.error(f"--json={arguments.json}: there is no folder {folder} that can be written to")
    if arguments.json.is_dir():
        parser.error(f"--json={arguments.json} is a folder")
