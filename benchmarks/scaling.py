"""What a train step asks of many devices, told by its compiled program; no such devices needed.

    python -m benchmarks.scaling --size vit_h14 --devices 64 --strategy fsdp [--json FILE.json]
    python -m benchmarks.scaling --table --json benchmarks/results/scaling.json

Lowers and compiles the very step that train.py runs on accelerators, for so many virtual CPU
devices, without running it, and reads bytes of memory and of collectives from the program. Step
times are predicted from these by a simple model, whose assumptions are flags (docs/scaling.md).
Bytes are per device; those of collectives are of the arrays that a device gets, or that a
reduce-scatter takes.

Exits with 2 where a strategy would leave too much of the state whole on every device.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from benchmarks import cluster, flags, hlo
from benchmarks.cluster import Cluster
from mae_jax.distributed import sharding
from mae_jax.models import flops, mixed_precision_dense, variants
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.models.layers import REMAT_POLICIES, ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState, init_state, jit_step, make_train_step
from mae_jax.utils.atomic import write_json
from mae_jax.utils.console import print_summary_table

SIZES = variants.VARIANTS | {
    "vit_2b": VitVariant(1664, 48, 16, 14)
}  # as ViT-G/14, with MAE's decoder
MLP_RATIOS = {"vit_2b": 8192 / 1664}  # of encoders other than 4, which decoders have too
DECODER_MLP_RATIO = 4.0
STRATEGIES = ("replicate", "fsdp", "hsdp8")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# Machine code that nobody runs need not be fast: the same program in half of the time.
NEVER_RUN = {"xla_backend_optimization_level": 0}
TIMEOUT = 180  # seconds that a row of the table may take


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A train step to compile: fsdp as in `sharding.make_mesh`, over all devices that there are.

    per_device_batch: images; image_size: pixels; min_split_bytes as in `sharding.state_shardings`;
    pinned: whether activations are held to their batch axis, as train.py does; scan_unroll as in
    `Execution`.
    """

    size: VitVariant
    fsdp: int
    per_device_batch: int = 32
    remat: str = "full"
    dtype: str = "f32"
    mlp_ratio: float = 4.0
    image_size: int = 224
    min_split_bytes: int = sharding.MIN_SPLIT_BYTES
    pinned: bool = True
    scan_unroll: int = 1


@dataclass(frozen=True)
class Step:
    """A train step that is not compiled yet, the state that it takes, and how that is laid out."""

    setup: Setup
    task: Pretrain
    mesh: Mesh
    shapes: TrainState
    shardings: TrainState
    lowered: jax.stages.Lowered


@dataclass(frozen=True)
class Program(Step):
    """The same, compiled, and the seconds that this took."""

    compiled: jax.stages.Compiled
    seconds: float


def fsdp_of(strategy: str, devices: int) -> int:
    """Devices that the state is split over."""
    return {"replicate": 1, "fsdp": devices, "hsdp8": 8}[strategy]


def compile_step(setup: Setup) -> Program:
    """The train step of a setup for all devices, compiled.

    Raises:
      ValueError: the state cannot be split as asked for.
    """
    begin = time.perf_counter()
    step = lower_step(setup)
    compiled = step.lowered.compile(NEVER_RUN)
    return Program(**vars(step), compiled=compiled, seconds=time.perf_counter() - begin)


def lower_step(setup: Setup) -> Step:
    """The train step of a setup for all devices, before XLA has seen it.

    Raises:
      ValueError: the state cannot be split as asked for.
    """
    mesh = sharding.make_mesh(setup.fsdp)
    task, batch_size = _make_task(setup, mesh), setup.per_device_batch * mesh.size
    learning_rate = warmup_cosine(peak=1.5e-4 * batch_size / 256, warmup_steps=40, total_steps=800)
    tx = adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    shapes = jax.eval_shape(lambda key: init_state(task, tx, key), jax.random.key(0))
    shardings = sharding.state_shardings(shapes, mesh, setup.min_split_bytes)
    sharding.check_split(shapes, shardings, mesh, sharding.MAX_REPLICATED)
    step = make_train_step(task, tx, learning_rate, jax.random.key(1))
    jitted = jit_step(step, shardings)
    images = jax.ShapeDtypeStruct((batch_size, setup.image_size, setup.image_size, 3), jnp.uint8)
    inputs = (shapes, {"image": images})
    placed = _placed(inputs, (shardings, {"image": NamedSharding(mesh, sharding.BATCH_SPEC)}))
    return Step(setup, task, mesh, shapes, shardings, jitted.lower(*placed))


def _make_task(setup: Setup, mesh: Mesh) -> Pretrain:
    """The paper's pretraining."""
    patch = setup.size.patch
    grid = patch_grid((setup.image_size, setup.image_size), patch)
    execution = ExecutionConfig(
        dtype=DTYPES[setup.dtype],
        remat=setup.remat,
        scan_unroll=setup.scan_unroll,
        constrain=sharding.batch_constraint(mesh) if setup.pinned else lambda x: x,
    )
    model = make_mae(
        setup.size,
        grid=grid,
        mlp_ratio=setup.mlp_ratio,
        decoder_mlp_ratio=DECODER_MLP_RATIO,
        execution=execution,
    )
    return Pretrain(model=model, grid=grid, patch=patch, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _placed(shapes: Any, shardings: Any) -> Any:
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings)


def report(program: Program, assumed: Cluster) -> dict[str, Any]:
    """What the program needs and sends, in bytes per device, and the predicted times."""
    found = hlo.collectives(program.compiled.as_text())
    return {
        **_describe(program),
        **_memory(program),
        **_traffic(found),
        "foreign_arrays": foreign_arrays(program, found),
        "global_batch_arrays": global_batch_arrays(program, found),
        "compile_seconds": round(program.seconds, 1),
        "prediction": cluster.predict(_useful_flops(program), found, assumed),
    }


def _describe(program: Program) -> dict[str, Any]:
    setup = program.setup
    return {
        "devices": program.mesh.size,
        "fsdp": setup.fsdp,
        "per_device_batch": setup.per_device_batch,
        "global_batch": setup.per_device_batch * program.mesh.size,
        "dtype": setup.dtype,
        "remat": setup.remat,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.shapes.params)),
    }


def _memory(program: Program) -> dict[str, int]:
    """Of the state by its layout, of all else by the compiler's own account."""
    shapes, shardings = program.shapes, program.shardings
    held = lambda part: sum(
        sharding.bytes_per_device(getattr(shapes, part), getattr(shardings, part))
    )
    memory = program.compiled.memory_analysis()
    return {
        "params_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.params)),
        "params_bytes_per_device": held("params"),
        "optimizer_bytes_per_device": held("opt_state"),
        "args_bytes_per_device": memory.argument_size_in_bytes,
        "temp_bytes_per_device": memory.temp_size_in_bytes,
    }


def _traffic(found: list[hlo.Collective]) -> dict[str, int]:
    traffic = {}
    for kind in hlo.KINDS:
        name = kind.replace("-", "_")
        traffic[f"{name}_bytes"] = hlo.total_bytes(found, kind)
        traffic[f"{name}_count"] = sum(each.times for each in found if each.kind == kind)
    return traffic


def foreign_arrays(program: Program, found: list[hlo.Collective]) -> list[str]:
    """Arrays of collectives that are neither single numbers nor as large as some parameter.

    As large as all of it, a block's part of it, or a device's part of either.
    """
    known = {1}
    for leaf, where in zip(
        jax.tree.leaves(program.shapes.params), jax.tree.leaves(program.shardings.params)
    ):
        for shape in (leaf.shape, where.shard_shape(leaf.shape)):
            known |= {math.prod(shape), math.prod(shape[1:])}
    return _named(found, lambda shape: math.prod(shape.dims) not in known)


def global_batch_arrays(program: Program, found: list[hlo.Collective]) -> list[str]:
    """Those of them that hold tokens, or patches, of the images of all devices."""
    task = program.task
    patches = {task.num_patches, task.num_kept, task.num_patches - task.num_kept}
    tokens = patches | {task.num_patches + 1, task.num_kept + 1}
    batch = program.setup.per_device_batch * program.mesh.size
    foreign = foreign_arrays(program, found)
    held = _named(found, lambda shape: shape.has_rows(batch, tokens))
    return [name for name in held if name in foreign]


def _named(found: list[hlo.Collective], chosen: Callable[[hlo.Shape], bool]) -> list[str]:
    return sorted(
        {f"{each.kind} {shape}" for each in found for shape in each.shapes if chosen(shape)}
    )


def _useful_flops(program: Program) -> float:
    """FLOPs of a device in a step, in the paper's form: rematerialisation is not counted."""
    setup, task = program.setup, program.task
    shape = task.num_patches, task.num_kept, task.patch**2 * 3
    encoder = lambda ratio: flops.encoder_flops(setup.size, *shape, ratio)
    wider = 3 * (encoder(setup.mlp_ratio) - encoder(DECODER_MLP_RATIO))
    image = flops.train_flops(setup.size, *shape, DECODER_MLP_RATIO) + wider
    return setup.per_device_batch * image


def table_rows() -> Iterator[tuple[str, int, str, str, str]]:
    """Size, devices, strategy, dtype and remat of every row of the table."""
    for size in ("vit_b16", "vit_l16", "vit_h14", "vit_2b"):
        for devices in (8, 64, 256, 512):
            for strategy in STRATEGIES:
                if (strategy, devices) != ("hsdp8", 8):  # the same as fsdp
                    yield size, devices, strategy, "f32", "full"
    for devices in (64, 512):
        for strategy in STRATEGIES:
            yield "vit_h14", devices, strategy, "bf16", "full"
    for remat in ("none", "dots"):
        for strategy in ("replicate", "fsdp"):
            yield "vit_h14", 64, strategy, "f32", remat


def make_table(path: Path) -> None:
    """Compiles every row in a process of its own, and writes all that are done after each."""
    rows: list[dict[str, Any]] = []
    for size, devices, strategy, dtype, remat in table_rows():
        rows.append(_run_row(size, devices, strategy, dtype, remat))
        write_json(path, rows)
        print("  ".join(_cells(rows[-1])), flush=True)


def _run_row(size: str, devices: int, strategy: str, dtype: str, remat: str) -> dict[str, Any]:
    chosen = dict(size=size, devices=devices, strategy=strategy, dtype=dtype, remat=remat)
    command = [sys.executable, "-m", "benchmarks.scaling"]
    command += [f"--{name}={value}" for name, value in chosen.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        try:
            done = subprocess.run(
                [*command, f"--json={path}"], capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return chosen | {"error": f"not compiled within {TIMEOUT} s"}
        if done.returncode:
            return chosen | {"error": done.stderr.strip().splitlines()[-1]}
        warnings = done.stderr.count("Involuntary full rematerialization")
        return json.loads(path.read_text()) | {"involuntary_rematerialisations": warnings}


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [str(row[name]) for name in ("size", "devices", "strategy", "dtype", "remat")]
    if "error" in row:
        return [*cells, row["error"]]
    names = ("params_bytes_per_device", "optimizer_bytes_per_device", "temp_bytes_per_device")
    names += ("all_gather_bytes", "all_reduce_bytes")
    prediction = row["prediction"]
    both = prediction["efficiency"], prediction["efficiency_overlapped"]
    return [
        *cells,
        *(f"{name.split('_bytes')[0]} {row[name] / 1e9:.2f} GB" for name in names),
        "predicted efficiency " + " to ".join(f"{efficiency:.2f}" for efficiency in both),
    ]


def print_report(row: dict[str, Any]) -> None:
    """Prints one row: what was compiled, bytes, and what is predicted from them."""
    title = f"{row['size']} on {row['devices']} devices, {row['strategy']}: the compiled program"
    prediction = dict(row["prediction"])
    assumptions = prediction.pop("assumptions")
    print_summary_table(title, {name: _readable(row[name]) for name in row if name != "prediction"})
    print_summary_table("A prediction of a simple model, not a measurement", prediction)
    print_summary_table(
        "What it assumes", {name: f"{value:g}" for name, value in assumptions.items()}
    )


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="vit_h14")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--strategy", choices=STRATEGIES, default="replicate")
    parser.add_argument("--per-device-batch", type=int, default=32, help="images")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="full")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of activations")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--table", action="store_true", help="all rows of the table, to --json")
    cluster.add_flags(parser)
    arguments = parser.parse_args()
    flags.check_positive(parser, arguments)
    flags.check_json(parser, arguments)
    if arguments.table and not arguments.json:
        parser.error("--table needs --json")
    return arguments


def main() -> None:
    arguments = _parse()
    if arguments.table:
        make_table(arguments.json)
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    setup = Setup(
        size=SIZES[arguments.size],
        fsdp=fsdp_of(arguments.strategy, arguments.devices),
        per_device_batch=arguments.per_device_batch,
        remat=arguments.remat,
        dtype=arguments.dtype,
        mlp_ratio=MLP_RATIOS.get(arguments.size, 4.0),
    )
    try:
        with mock.patch.object(
            mixed_precision_dense, "_on_cpu", return_value=False
        ):  # as accelerators multiply
            program = compile_step(setup)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = {"size": arguments.size, "strategy": arguments.strategy}
    row = names | report(program, cluster.from_flags(arguments))
    print_report(row)
    if arguments.json:
        write_json(arguments.json, row)


if __name__ == "__main__":
    main()
