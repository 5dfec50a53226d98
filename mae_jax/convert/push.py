"""Prepare a folder with the weights and a model card for the Hugging Face hub.

python -m mae_jax.convert.push RUN org/name [--out DIR] [--to FORMAT] [--license apache-2.0]
"""

import argparse
import logging
import re
import shlex
from pathlib import Path

from mae_jax.convert import cli as convert_cli
from mae_jax.convert import weights
from mae_jax.convert.hub import parse_name
from mae_jax.convert.locate import checkpoint_argument, locate
from mae_jax.convert.model_card import model_card, run_facts, write_card
from mae_jax.convert.model_info import ConvertError
from mae_jax.utils import cli

log = logging.getLogger("mae_jax")

FORMATS = ("hf", "timm", "mae_jax")  # in the order of preference


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    out = arguments.out or Path(arguments.repo.split("/")[1])
    if out.suffix.lower() in weights.io.SINGLE_FILE_SUFFIXES:
        raise ConvertError(f"--out {out} must be a folder")
    source = locate(arguments.run)
    checkpoint = weights.read(source.path, **convert_cli.format_kwargs(arguments))
    dialect = arguments.to or next(
        each for each in FORMATS if each in weights.compatible_formats(checkpoint.info)
    )
    if weights.lacks_decoder(dialect, checkpoint.info) and checkpoint.info.decoder_depth:
        log.warning("the model of %s has no decoder: it is left out", dialect)
        checkpoint = weights.encoder_only(checkpoint)
    text = model_card(
        checkpoint.info,
        dialect,
        run_facts(source.path.absolute()),
        repo=arguments.repo,
        license_id=arguments.license or "",
    )
    weights.write(checkpoint, out, dialect, overwrite=arguments.overwrite)
    write_card(out, text)
    print(f"{out} is ready. To upload it:")
    print(f"  {shlex.join(['hf', 'upload', arguments.repo, str(out), '.'])}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.convert.push", __doc__)
    parser.add_argument("run", type=checkpoint_argument, help="a workdir, or any other checkpoint")
    parser.add_argument("repo", type=_repo, metavar="org/name", help="the model on the hub")
    parser.add_argument("--out", type=cli.path_argument, help="folder to write (name)")
    parser.add_argument("--to", choices=FORMATS, help="format (the first that fits the model)")
    parser.add_argument(
        "--license", type=_license, help="as the hub names it, as apache-2.0 (none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files in the folder")
    convert_cli.add_format_flags(parser)
    return parser


def _repo(text: str) -> str:
    """Parse org/name."""
    name = parse_name(text)
    if name is None or name.repo != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form org/name")
    return text


def _license(text: str) -> str:
    """Parse the identifier of a license."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an identifier of the hub, such as apache-2.0 or cc-by-nc-4.0"
        )
    return text


if __name__ == "__main__":
    cli.run_command(main)
