"""Where the time of the train step goes, read from a profile of the very step that train.py runs.

    python -m benchmarks.profile --size vit_b16 --batch 256 --dtype bf16 --json out.json

Steps on random images are profiled after some that are timed without. Shares are of the time from
the first kernel's start to the last one's end, of the first device: they sum to 1 with the idle
time between kernels. On a CPU they are of its operations, several of which may run at once; there
"idle" is time in which none ran, which is the host's.
"""

import argparse
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import flags, traces
from benchmarks.machine import environment, versions
from benchmarks.operations import operations
from benchmarks.step import PIXELS
from benchmarks.workers.ours import DTYPES, make_task
from benchmarks.workers.protocol import UnusableError
from mae_jax.models import flops
from mae_jax.models.layers import REMAT_POLICIES
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import Batch, TrainState, init_state, jit_step, make_train_step
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_table, progress

BATCHES = 4  # different ones, which take turns
TIMED = 5  # steps, or as many as are profiled


def make_images(batch: int, side: int) -> list[Batch]:
    """Batches of random pixels."""
    keys = jax.random.split(jax.random.key(2), BATCHES)
    shape = (batch, side, side, 3)
    return [{"image": jax.random.bits(key, shape, jnp.uint8)} for key in keys]


def compile_step(
    task: Pretrain, batch: Batch
) -> tuple[TrainState, Callable[[TrainState, Batch], tuple[TrainState, Any]], str]:
    """The first state, the compiled step, and the text of its program."""
    rows = len(batch["image"])
    rate = warmup_cosine(peak=1.5e-4 * rows / 256, warmup_steps=40, total_steps=800)
    tx = adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    state = jax.jit(lambda key: init_state(task, tx, key))(jax.random.key(0))
    step = make_train_step(task, tx, rate, jax.random.key(1))
    compiled = jit_step(step).lower(state, batch).compile()
    return state, compiled, compiled.as_text()


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole report."""
    task = make_task(vars(arguments) | PIXELS)
    images = make_images(arguments.batch, arguments.image_size)
    begin = time.perf_counter()
    state, step, text = compile_step(task, images[0])
    compile_seconds = time.perf_counter() - begin
    turns = itertools.cycle(images)

    def run(count: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, next(turns))
        jax.block_until_ready(state)
        return (time.perf_counter() - begin) / count

    run(2)
    count = arguments.steps
    step_seconds = median(run(count) for _ in progress(range(TIMED), TIMED, "bursts"))
    program = operations(text)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.trace or Path(made)
        with jax.profiler.trace(str(folder), profiler_options=_options()):
            profiled_seconds = run(count)
        intervals = traces.read_intervals(folder, _module(text))
    if jax.default_backend() == "cpu":
        intervals = traces.ended(intervals, program)
    return {
        "command": "python -m benchmarks.profile",
        **{name: getattr(arguments, name) for name in ("size", "batch", "dtype", "image_size")},
        "remat": arguments.remat,
        "scan_unroll": arguments.scan_unroll,
        "attention": arguments.attention,
        "xla_flags": arguments.xla_flags,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "compile_s": compile_seconds,
        "step_ms": 1e3 * step_seconds,
        "profiled_step_ms": 1e3 * profiled_seconds,
        "images_per_s": arguments.batch / step_seconds,
        "model_tflops": _model_flops(task, arguments.size) * arguments.batch / step_seconds / 1e12,
        "profiled_steps": count,
        **traces.shares(intervals, program),
        "environment": environment(),
        "versions": versions(("jax", "jaxlib", "flax", "optax")),
    }


def _options() -> jax.profiler.ProfileOptions:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # what Python does is not asked for, and takes time
    return options


def _module(text: str) -> str:
    """The name of a program, which its operations carry in a trace."""
    found = re.match(r"HloModule ([\w.-]+)", text)
    return found.group(1) if found else ""


def _model_flops(task: Pretrain, size: str) -> float:
    """Of one image, in the paper's form."""
    return flops.train_flops(
        VARIANTS[size], task.num_patches, task.num_kept, task.model.decoder.patch_values
    )


def print_report(report: dict[str, Any]) -> None:
    """Prints the tables."""
    print(
        f"{report['size']}, batch {report['batch']}, {report['dtype']} on {report['platform']} "
        f"({report['device']}): {report['step_ms']:,.2f} ms, "
        f"{report['images_per_s']:,.1f} images/s, {report['model_tflops']:,.3f} TFLOP/s in the "
        f"paper's count; under the profiler {report['profiled_step_ms']:,.2f} ms"
    )
    step = report["nanoseconds"] / report["profiled_steps"] / 1e6
    row = lambda name, share: (name, "", f"{share:.1%}", f"{share * step:,.3f}")
    columns = ("", "", "share", "ms a step")
    for title, kind in (("What it does", "categories"), ("Where in the step", "parts")):
        print_table(title, columns, [row(*item) for item in report[kind].items()])
    longest = [
        (each["name"][:28], each["part"], f"{each['share']:.1%}")
        + (each["runs"] // report["profiled_steps"], each["category"][:14])
        for each in report["longest"]
    ]
    print_table("The longest operations", ("", "", "share", "runs", ""), longest)
    if report["unknown"]:
        print(f"{report['unknown']:.1%} are kernels whose names alone tell what they do.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=VARIANTS, default="vit_b16")
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="none")
    parser.add_argument("--scan-unroll", type=int, default=1, help="blocks per iteration")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), default="auto")
    parser.add_argument("--xla-flags", default=os.environ.get("XLA_FLAGS", ""), help="XLA_FLAGS")
    parser.add_argument("--steps", type=int, default=5, help="to profile")
    parser.add_argument("--trace", type=Path, help="empty folder to leave the trace in")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    flags.check_positive(parser, arguments)
    flags.check_image_size(parser, arguments, VARIANTS[arguments.size].patch)
    flags.check_json(parser, arguments)
    if arguments.trace and arguments.trace.exists() and any(arguments.trace.iterdir()):
        parser.error(f"--trace={arguments.trace} is not empty")
    return arguments


def main() -> None:
    arguments = _parse()
    os.environ["XLA_FLAGS"] = arguments.xla_flags  # which XLA reads when it is first asked
    if arguments.dtype == "f32":
        jax.config.update("jax_default_matmul_precision", "highest")  # a GPU may round to tf32
    try:
        report = profile(arguments)
    except (UnusableError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print_report(report)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
