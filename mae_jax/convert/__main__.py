"""Convert MAE and Pixio weights between mae_jax, the official code, Hugging Face and timm.

mae-jax convert SRC DST --to {mae_jax,official,timm,hf,pixio}
mae-jax inspect SRC
"""

import argparse
from collections import Counter

from mae_jax.convert import cli as convert_cli
from mae_jax.convert import weights
from mae_jax.convert.key_maps import DIALECTS
from mae_jax.convert.locate import checkpoint_argument, locate
from mae_jax.convert.model_card import model_card, run_facts, write_card
from mae_jax.utils import cli
from mae_jax.utils.console import print_summary_table
from mae_jax.utils.sides import sides_text

SOURCE = "a weights file or directory, a workdir, or org/name on the hub"


def main(argv: list[str]) -> None:
    if argv[:1] == ["inspect"]:
        inspect(argv[1:])
    else:
        convert(argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.convert", __doc__)
    parser.epilog = "`mae-jax inspect SRC` describes a checkpoint."
    parser.add_argument("src", type=checkpoint_argument, help=SOURCE)
    parser.add_argument(
        "dst",
        type=cli.path_argument,
        help="one file if it ends in .safetensors or .pth, else a directory",
    )
    parser.add_argument("--to", choices=DIALECTS, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--image-size",
        type=cli.int_pair,
        metavar="H,W",
        help="interpolate the positional embeddings to this image size (bicubic, as the reference)",
    )
    parser.add_argument(
        "--channels",
        type=cli.positive_int,
        help="of images: 1 sums the patch embedding over the old channels; more repeat them in "
        "order, scaled by old / new",
    )
    parser.add_argument(
        "--encoder-only",
        action="store_true",
        help="do not convert the decoder, nor the head of a segmentation model",
    )
    convert_cli.add_format_flags(parser)
    return parser


def build_inspect_parser() -> argparse.ArgumentParser:
    """Return the parser of `inspect`."""
    parser = cli.make_parser("mae_jax.convert inspect", "Describe a checkpoint.")
    parser.add_argument("src", type=checkpoint_argument, help=SOURCE)
    convert_cli.add_format_flags(parser)
    return parser


def convert(argv: list[str]) -> None:
    """Convert a checkpoint."""
    arguments = build_parser().parse_args(argv)
    weights.check_destination(arguments.dst, arguments.to, overwrite=arguments.overwrite)
    source = locate(arguments.src).path
    checkpoint = weights.read(source, **convert_cli.format_kwargs(arguments))
    if arguments.encoder_only:
        checkpoint = weights.encoder_only(checkpoint)
        if checkpoint.info.segments:
            checkpoint = weights.without_head(checkpoint)
    checkpoint = weights.adapt(
        checkpoint, channels=arguments.channels, image_size=arguments.image_size
    )
    weights.write(checkpoint, arguments.dst, arguments.to, overwrite=arguments.overwrite)
    if arguments.to == "hf" and arguments.dst.is_dir():
        facts = run_facts(source.absolute())
        card = model_card(checkpoint.info, "hf", facts, repo=arguments.dst.absolute().name)
        write_card(arguments.dst, card)


def inspect(argv: list[str]) -> None:
    """Print what a checkpoint contains."""
    arguments = build_inspect_parser().parse_args(argv)
    checkpoint = weights.read(
        arguments.src, require_num_heads=(), **convert_cli.format_kwargs(arguments)
    )
    print_summary_table(str(arguments.src), describe(checkpoint))


def describe(checkpoint: weights.Weights) -> dict[str, str]:
    """Return the rows of the table of `inspect`."""
    info = checkpoint.info
    size = f"{info.width} features x {info.depth} deep, {_heads(info.heads)}"
    decoder, head = "none", "none"
    if info.decoder_depth:
        decoder = (
            f"{_count(checkpoint, 'decoder/')}: {info.decoder_width} features x "
            f"{info.decoder_depth} deep, {_heads(info.decoder_heads)}"
        )
    if info.num_classes:
        head = f"{info.num_classes} classes, {'named' if info.class_names else 'without names'}"
        head += ", after a BatchNorm" if info.head_norm else ""
        if info.upsample_width:
            head += f", after upsampling with {info.upsample_width} features"
        head += f", {info.problem}"
    cls = "cls token" if info.class_tokens == 1 else "mean of the class tokens"
    pools = {"cls": cls, "mean": "mean of the patches", "attention": "learned attention"}
    pools["grid"] = "none, every patch"
    dtypes = Counter(array.dtype.name for array in checkpoint.arrays.values())
    return {
        "names": checkpoint.layout,
        "weights from": info.source,
        "size": info.size_name,
        "encoder": f"{_count(checkpoint, 'encoder/')}: {size}",
        "class tokens": str(info.class_tokens),
        "decoder": decoder,
        "head": head,
        "pooling": f"{pools[info.pool]}, "
        f"{'then fc_norm' if info.fc_norm else 'after the final norm'}",
        "images": f"{info.image_size[0]} x {info.image_size[1]} x {info.channels}, "
        f"patches of {sides_text(info.patch)}",
        "preprocessing": _preprocessing(info),
        "mean, std": f"{_numbers(info.mean)}, {_numbers(info.std)}",
        "target": f"{info.target} (norm_pix_eps {info.norm_pix_eps:g})"
        if info.decoder_depth
        else "none",
        "layer_norm_eps": f"{info.layer_norm_eps:g}",
        "dtype": ", ".join(f"{name} ({count} arrays)" for name, count in dtypes.items()),
        "supports": ", ".join(_uses(info)),
        "converts to": ", ".join(weights.compatible_formats(info)),
    }


def _count(checkpoint: weights.Weights, part: str) -> str:
    number = checkpoint.count(part)
    return f"{number / 1e6:.1f} M parameters" if number >= 1e6 else f"{number:,} parameters"


def _heads(count: int) -> str:
    return f"{count} heads" if count else "heads unknown (--num-heads, --decoder-num-heads)"


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _preprocessing(info: weights.ModelInfo) -> str:
    crop = f"center crop {info.crop:.4g}"
    rule = {
        "crop": crop,
        "cover": crop,
        "squash": "full image resized" + (f", {crop}" if info.crop < 1 else ""),
        "border": f"full image with a border, {crop}",
        "processor": f"resized to {dict(info.size)}, center crop {info.crop_size}",
    }[info.resize]
    depth = f", values of {info.bit_depth} bits" if info.bit_depth else ""
    nodata = f", without data where {info.nodata}" if info.nodata else ""
    window = f", DICOM window {info.dicom_window}" if info.dicom_window else ""
    bands = f", bands {info.bands}" if info.bands else ""
    return f"{rule}, {info.interpolation}{depth}{nodata}{bands}{window}"


def _uses(info: weights.ModelInfo) -> list[str]:
    uses = ["features"]
    if not info.fc_norm:  # pretraining needs the final norm, which fc_norm replaces
        uses.append("warm start")
    if info.decoder_depth:
        known = info.target != "unknown"
        uses.append("reconstruction" if known else "reconstruction (--target needed)")
    if info.num_classes:
        uses.append("segmentation" if info.segments else "prediction")
    return uses


if __name__ == "__main__":
    cli.run_command(main)
