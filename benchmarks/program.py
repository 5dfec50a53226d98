"""What the compiler makes of a train step, counted instead of timed.

    python -m benchmarks.program --size vit_ti16 --per-device-batch 8 --dtype bf16 [--json FILE]
    python -m benchmarks.program --record

Lowers and compiles the very step that train.py runs, for a few virtual CPU devices, without running
it. Counts are of one device, loops multiplied out; FLOPs are of the global batch, by XLA's analysis
of the unrolled and unoptimised program, beside ours.

--record writes the counts of two tiny steps, in float32 and bfloat16, to tests/step_budgets.json,
for the minor version of jax that is installed. Tests hold the step to them: record anew where more
of something is meant to be, or less has been reached.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import counts, flags, scaling
from benchmarks.scaling import Program, Setup
from mae_jax.models import flops, variants
from mae_jax.models.layers import REMAT_POLICIES
from mae_jax.models.variants import VitVariant
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_summary_table, print_table, progress

BUDGETS = Path(__file__).parent.parent / "tests" / "step_budgets.json"
DEVICES = 4  # as in the tests
TINY = Setup(
    size=VitVariant(64, 3, 2, 8, decoder_width=32, decoder_depth=2, decoder_heads=2),
    fsdp=1,
    per_device_batch=8,
    remat="none",
    image_size=64,
)


def compile_step(setup: Setup) -> Program:
    """The train step with products of the precision of a run, whatever was set before."""
    with jax.default_matmul_precision("default"):
        return scaling.compile_step(setup)


def measure(program: Program) -> dict[str, int]:
    """How often a program does what costs time without computing, and its temporary bytes."""
    text = program.compiled.as_text()
    wide = counts.float32(counts.products(text))
    return {
        **counts.counts(text),
        "float32_product": sum(product.times for product in wide),
        "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
    }


def train_flops(setup: Setup) -> tuple[float, float]:
    """FLOPs of a step on the batch of all devices: by XLA, and of the products by our count."""
    step = scaling.lower_step(_unrolled(setup))
    return step.lowered.cost_analysis()["flops"], _count(step, flops.executed_train_flops)


def forward_flops(setup: Setup) -> tuple[float, float]:
    """The same of the loss alone."""
    step = scaling.lower_step(_unrolled(setup))
    task, side = step.task, setup.image_size
    batch = {"image": jnp.zeros((setup.per_device_batch * step.mesh.size, side, side, 3), "uint8")}
    batch = jax.eval_shape(task.draw, jax.random.key(0), batch)
    lowered = jax.jit(task.loss).lower(step.shapes.params, {}, batch)
    return lowered.cost_analysis()["flops"], _count(step, flops.executed_forward_flops)


def _unrolled(setup: Setup) -> Setup:
    """XLA counts the body of a loop only once."""
    return dataclasses.replace(
        setup, scan_unroll=max(setup.size.depth, setup.size.decoder_depth), remat="none"
    )


def _count(step: scaling.Step, of_image: Any) -> float:
    task, setup = step.task, step.setup
    image = of_image(setup.size, task.num_patches, task.num_kept, task.patch**2 * 3)
    return setup.per_device_batch * step.mesh.size * image


def minor_version() -> str:
    """Of jax, as in "0.10"."""
    return ".".join(jax.__version__.split(".")[:2])


def read_budgets() -> dict[str, dict[str, dict[str, int]]]:
    """Counts by version of jax, dtype and what is counted."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def record() -> None:
    """Writes the counts of the installed version, and prints them beside those before."""
    budgets, version = read_budgets(), minor_version()
    dtypes = progress(scaling.DTYPES, len(scaling.DTYPES), "programs")
    now = {dtype: measure(compile_step(dataclasses.replace(TINY, dtype=dtype))) for dtype in dtypes}
    before = budgets.get(version, {})
    rows = [
        (dtype, name, before.get(dtype, {}).get(name, "-"), value)
        for dtype, found in now.items()
        for name, value in found.items()
    ]
    write_json(BUDGETS, dict(sorted((budgets | {version: now}).items())))
    title = f"Budgets of the train step, jax {version}, in {BUDGETS}"
    print_table(title, ("dtype", "count", "before", "now"), rows)


def report(setup: Setup) -> dict[str, Any]:
    """All that is known of a step without running it."""
    program = compile_step(setup)
    memory = program.compiled.memory_analysis()
    found = {"devices": program.mesh.size, "dtype": setup.dtype, "remat": setup.remat}
    for name, (by_xla, ours) in {
        "forward": forward_flops(setup),
        "train": train_flops(setup),
    }.items():
        found |= {f"{name}_gflops_by_xla": by_xla / 1e9, f"{name}_gflops_counted": ours / 1e9}
        found[f"{name}_by_xla_to_counted"] = by_xla / ours
    lowered = counts.lowered_products(program.lowered.as_text())
    return {
        **found,
        **measure(program),
        "float32_product_before_compiling": len(counts.float32(lowered)),
        "argument_bytes": memory.argument_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
    }


def print_report(size: str, found: Mapping[str, Any]) -> None:
    """Prints a report."""
    title = f"The train step of {size}: counts of the compiled program"
    readable = lambda value: f"{value:,}" if isinstance(value, int) else value
    print_summary_table(title, {name: readable(value) for name, value in found.items()})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=variants.VARIANTS, default="vit_ti16")
    parser.add_argument("--per-device-batch", type=int, default=8, help="images")
    parser.add_argument("--dtype", choices=scaling.DTYPES, default="f32", help="of activations")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="none")
    parser.add_argument("--devices", type=int, default=DEVICES, help="virtual ones")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--record", action="store_true", help="write tests/step_budgets.json")
    arguments = parser.parse_args()
    flags.check_positive(parser, arguments)
    flags.check_json(parser, arguments)
    return arguments


def main() -> None:
    arguments = _parse()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES if arguments.record else arguments.devices)
    if arguments.record:
        record()
        return
    setup = Setup(
        size=variants.get_variant(arguments.size),
        fsdp=1,
        per_device_batch=arguments.per_device_batch,
        remat=arguments.remat,
        dtype=arguments.dtype,
    )
    found = report(setup)
    print_report(arguments.size, found)
    if arguments.json:
        write_json(arguments.json, {"size": arguments.size, "jax": jax.__version__, **found})


if __name__ == "__main__":
    main()
