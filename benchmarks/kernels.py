"""How fast the matrix products and the attention of one size run alone, at the shapes of its step.

    python -m benchmarks.kernels --size vit_b16 --batch 256 --dtype bf16 --json out.json

Every linear layer forward and in its two backward products, as TFLOP/s and as a share of one large
product in the same run: what a step could reach if all else were free. Then attention, forward and
backward, in each implementation of `jax.nn.dot_product_attention`, with its distance from float32.
What does not run here is a row with the reason.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import flags, timing
from benchmarks.machine import environment, versions
from benchmarks.workers import ceiling
from benchmarks.workers.ours import DTYPES
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.patches import patch_grid
from mae_jax.models.variants import VARIANTS, VitVariant
from mae_jax.tasks.masking import len_keep
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_table, progress

MLP_RATIO = 4
CHANNELS = 3
ATTENTION = ("ours", "xla", "cudnn")  # the latter two of jax.nn.dot_product_attention
CHECKED = 16  # images of a batch on which attention is compared with float32
ASSUMED = {"gpu": 5e14, "cpu": 5e10}  # FLOP/s, only to choose how much work one call has


@dataclass(frozen=True)
class Tokens:
    """How many tokens of an image each part sees.

    embedded: patches that are embedded; encoder and decoder: with the cls token; predicted: tokens
    whose pixels are predicted.
    """

    embedded: int
    encoder: int
    decoder: int
    predicted: int


@dataclass(frozen=True)
class Linear:
    """A layer of `times` blocks from `inputs` to `outputs` features, on `tokens` of an image.

    first: it needs no gradient with respect to its input.
    """

    name: str
    tokens: int
    inputs: int
    outputs: int
    times: int = 1
    first: bool = False

    def flops(self, batch: int = 1) -> int:
        """Of its forward product in one block."""
        return 2 * batch * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class Heads:
    """The shape of an attention: heads of `width` features over `tokens`."""

    name: str
    tokens: int
    heads: int
    width: int

    def flops(self, batch: int = 1) -> int:
        """Of scores and weighted values, forward."""
        return 4 * batch * self.heads * self.tokens**2 * self.width


def step_tokens(num_patches: int, kept: int) -> Tokens:
    """As our train step has them: it embeds kept patches only, and predicts masked ones only."""
    return Tokens(kept, kept + 1, num_patches + 1, num_patches - kept)


def linears(size: VitVariant, tokens: Tokens) -> list[Linear]:
    """Every linear layer of a train step, in the order in which it runs."""
    values = size.patch**2 * CHANNELS
    return [
        Linear("patch_embed", tokens.embedded, values, size.width, first=True),
        *_block_linears("encoder", tokens.encoder, size.width, size.depth),
        Linear("decoder_embed", tokens.encoder, size.width, size.decoder_width),
        *_block_linears("decoder", tokens.decoder, size.decoder_width, size.decoder_depth),
        Linear("head", tokens.predicted, size.decoder_width, values),
    ]


def _block_linears(part: str, tokens: int, width: int, depth: int) -> Iterator[Linear]:
    shapes = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, MLP_RATIO), "fc2": (MLP_RATIO, 1)}
    for name, (inputs, outputs) in shapes.items():
        yield Linear(f"{part} {name}", tokens, inputs * width, outputs * width, depth)


def attentions(size: VitVariant, num_patches: int, tokens: Tokens) -> list[Heads]:
    """The encoder's in training, the decoder's, and the encoder's of whole images."""
    head = size.width // size.heads
    decoder_head = size.decoder_width // size.decoder_heads
    return [
        Heads("encoder", tokens.encoder, size.heads, head),
        Heads("decoder", tokens.decoder, size.decoder_heads, decoder_head),
        Heads("whole images", num_patches + 1, size.heads, head),
    ]


# Products


def _forward(x: Array, kernel: Array, gradient: Array) -> Array:
    return x @ kernel


def _to_input(x: Array, kernel: Array, gradient: Array) -> Array:
    return jax.lax.dot_general(gradient, kernel, (((1,), (1,)), ((), ())))


def _to_kernel(x: Array, kernel: Array, gradient: Array) -> Array:
    dimensions = (((0,), (0,)), ((), ()))  # and in float32, as the step has it
    return jax.lax.dot_general(x, gradient, dimensions, preferred_element_type=jnp.float32)


PRODUCTS = {"forward": _forward, "to input": _to_input, "to kernel": _to_kernel}


def measure_linear(
    linear: Linear, batch: int, dtype: str, best: float, seconds: float
) -> Iterator[dict[str, Any]]:
    """One row for each of its products; best: FLOP/s of the large one."""
    rows, flops = batch * linear.tokens, linear.flops(batch)
    shapes = [(rows, linear.inputs), (linear.inputs, linear.outputs), (rows, linear.outputs)]

    def measure(function: Callable[..., Array]) -> dict[str, float]:
        inputs = _rotating(shapes, dtype, flops)
        rate = flops / timing.seconds_each(function, inputs, seconds)
        return {"tflops": rate / 1e12, "share_of_ceiling": rate / best}

    for product, function in PRODUCTS.items():
        if not (linear.first and product == "to input"):
            row = {"layer": linear.name, "product": product, "times": linear.times}
            row |= {"m": rows, "k": linear.inputs, "n": linear.outputs}
            yield row | _or_reason(functools.partial(measure, function))


def _rotating(shapes: list[tuple[int, ...]], dtype: str, flops: float) -> list[list[Array]]:
    """Several sets of random inputs, so many that one call has work enough."""
    bytes_each = 2 * sum(math.prod(shape) for shape in shapes) * DTYPES[dtype].dtype.itemsize
    copies = timing.copies_for(flops, _assumed_rate(), bytes_each)
    return [
        timing.random_arrays(jax.random.key(number), shapes, DTYPES[dtype])
        for number in range(copies)
    ]


def _assumed_rate() -> float:
    return ASSUMED.get(jax.default_backend(), ASSUMED["gpu"])


def _or_reason(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or {"error": why not}: whatever a backend may raise."""
    try:
        return measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": lines[0][:300]}


# Attention


def _forward_backward(implementation: str) -> Callable[..., list[Array]]:
    """Result and the three gradients, from q, k, v and the result's gradient [b, t, h, e]."""

    def run(q: Array, k: Array, v: Array, gradient: Array) -> list[Array]:
        attend = AttentionImpl()
        if implementation != "ours":
            attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        result, backward = jax.vjp(attend, q, k, v)
        return [result, *backward(gradient)]

    return run


def measure_attention(
    heads: Heads, batch: int, dtype: str, implementation: str, seconds: float
) -> dict[str, Any]:
    """One row: milliseconds forward and backward, TFLOP/s, and the distance from float32."""
    row = {"attention": heads.name, "tokens": heads.tokens, "heads": heads.heads}
    row |= {"head_width": heads.width, "implementation": implementation}
    shapes = [(batch, heads.tokens, heads.heads, heads.width)] * 4
    flops = 3 * heads.flops(batch)

    def measure() -> dict[str, float]:
        function = _forward_backward(implementation)
        inputs = _rotating(shapes, dtype, flops)
        distance = _distance(function, [array[:CHECKED] for array in inputs[0]])
        taken = timing.seconds_each(function, inputs, seconds)
        return {"ms": 1e3 * taken, "tflops": flops / taken / 1e12, "distance": distance}

    return row | _or_reason(measure)


def _distance(function: Callable[..., list[Array]], arrays: list[Array]) -> float:
    """The largest relative norm of what sets result and gradients apart from float32's."""
    exact = [array.astype(jnp.float32) for array in arrays]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(_forward_backward("xla"))(*exact)
    found = jax.jit(function)(*arrays)
    norm = jnp.linalg.norm
    return max(
        float(norm((ours.astype(jnp.float32) - theirs).ravel()) / norm(theirs.ravel()))
        for ours, theirs in zip(found, expected)
    )


# All of them


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    size, batch, dtype = VARIANTS[arguments.size], arguments.batch, arguments.dtype
    rows, columns = patch_grid((arguments.image_size,) * 2, size.patch)
    num_patches = rows * columns
    tokens = step_tokens(num_patches, len_keep(num_patches, 0.75))
    seconds = arguments.seconds
    if dtype == "f32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may round to tf32
    best = ceiling.measure(DTYPES[dtype])
    layers = linears(size, tokens)
    products = [
        row
        for layer in progress(layers, len(layers), "layers")
        for row in measure_linear(layer, batch, dtype, best["flops_per_s"], seconds)
    ]
    kinds = [(shape, name) for shape in attentions(size, num_patches, tokens) for name in ATTENTION]
    attention = [
        measure_attention(shape, batch, dtype, name, seconds)
        for shape, name in progress(kinds, len(kinds), "attentions")
    ]
    return {
        "command": "python -m benchmarks.kernels",
        "size": arguments.size,
        "batch": batch,
        "dtype": dtype,
        "image_size": arguments.image_size,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        "ceiling": best,
        "linears": summary(products),
        "products": products,
        "attention": attention,
        "environment": environment(),
        "versions": versions(("jax", "jaxlib")),
    }


def summary(products: list[dict[str, Any]]) -> dict[str, float]:
    """All products of a step one after the other: seconds, and their rate beside the ceiling.

    Empty where some product could not be measured.
    """
    if any("error" in row for row in products):
        return {}
    flops = lambda row: 2 * row["m"] * row["k"] * row["n"] * row["times"]
    total = sum(flops(row) for row in products)
    taken = sum(flops(row) / row["tflops"] / 1e12 for row in products)
    at_best = sum(flops(row) * row["share_of_ceiling"] / row["tflops"] / 1e12 for row in products)
    return {
        "tflop": total / 1e12,
        "ms": 1e3 * taken,
        "tflops": total / taken / 1e12,
        "share_of_ceiling": at_best / taken,
    }


def print_report(report: dict[str, Any]) -> None:
    """Prints the tables."""
    best = report["ceiling"]
    print(
        f"{report['size']}, batch {report['batch']}, {report['dtype']} on {report['platform']} "
        f"({report['device']}): the ceiling is {best['flops_per_s'] / 1e12:,.3f} TFLOP/s "
        f"({best['matmul']}), copies do {best['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    )
    cells = [
        [row["layer"], row["product"], f"{row['m']} x {row['k']} x {row['n']}", row["times"]]
        + _cells(row, "tflops", "share_of_ceiling")
        for row in report["products"]
    ]
    columns = ("layer", "product", "m x k x n", "times", "TFLOP/s", "share")
    print_table("Products of linear layers; share: of the ceiling", columns, cells)
    if report["linears"]:
        values = report["linears"]
        print(
            f"All of them, as often as a step runs them: {values['ms']:,.2f} ms, "
            f"{values['tflops']:,.3f} TFLOP/s, {values['share_of_ceiling']:.1%} of the ceiling\n"
        )
    cells = [
        [row["attention"], row["implementation"]]
        + [f"{row['tokens']} x {row['heads']} x {row['head_width']}"]
        + _cells(row, "ms", "tflops", "distance")
        for row in report["attention"]
    ]
    title = "Attention, forward and backward; distance: from float32, relative"
    columns = ("part", "by", "t x heads x width", "ms", "TFLOP/s", "distance")
    print_table(title, columns, cells)
    reasons = {
        row["error"] for row in (*report["products"], *report["attention"]) if "error" in row
    }
    for reason in sorted(reasons):
        print(f"failed: {reason}")


def _cells(row: dict[str, Any], *names: str) -> list[str]:
    return [f"{row[name]:.3g}" if name in row else "failed" for name in names]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=VARIANTS, default="vit_b16")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one measurement")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    flags.check_positive(parser, arguments)
    flags.check_image_size(parser, arguments, VARIANTS[arguments.size].patch)
    flags.check_json(parser, arguments)
    return arguments


def main() -> None:
    arguments = _parse()
    try:
        report = measure_all(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print_report(report)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
