"""Counts of the compiled train step: instructions, matrix products, collectives, memory.

    python -m tests.compiled_step --size vit_h14 --devices 64 --fsdp 64 --remat full
    python -m tests.compiled_step --record

Lowers and compiles the step of train.py for virtual CPU devices, without running it, and prints
JSON. Counts and bytes are per device, with loops multiplied out.

--record writes the counts of two tiny steps to tests/step_budgets.json, for the installed minor
version of jax. tests/test_step_program.py fails if a count grows: record again where that is
intended, or after an improvement.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from benchmarks.hlo import COLLECTIVES, collectives, count_kinds, products
from mae_jax.distributed import sharding
from mae_jax.models import flops, variants
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.models.layers import REMAT_POLICIES, ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.optimizer import adamw, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.train_step import TrainState, init_state, jit_step, make_train_step
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cli import make_parser, positive_int, run_command

BUDGETS = Path(__file__).parent / "step_budgets.json"
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# The program is not run: without optimized machine code it compiles in a fifth of the time.
NOT_RUN: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    NOT_RUN["xla_cpu_use_fusion_emitters"] = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A train step for all devices; names as the config keys of train.py.

    shard_activations: False leaves the sharding of activations to XLA, which train.py never does.
    """

    size: VitVariant
    fsdp: int = 1
    per_device_batch: int = 32
    remat: str = "none"
    dtype: str = "f32"
    image_size: int = 224
    min_split_bytes: int = sharding.MIN_SPLIT_BYTES
    scan_unroll: int = 1
    shard_activations: bool = True


# With more tokens on all devices than a layer is wide: see docs/reports/compiled_programs.md
TINY = Setup(
    size=VitVariant(64, 3, 2, 8, decoder_width=32, decoder_depth=2, decoder_heads=2),
    per_device_batch=24,
    image_size=40,
    min_split_bytes=2048,
)
RECORDED = {
    "f32": TINY,
    "bf16": dataclasses.replace(TINY, dtype="bf16", fsdp=4),
}


@dataclass(frozen=True)
class Step:
    """A lowered train step, and the state that it takes."""

    setup: Setup
    task: Pretrain
    mesh: Mesh
    shapes: TrainState
    shardings: TrainState
    lowered: jax.stages.Lowered

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        return self.lowered.compile(NOT_RUN)

    @functools.cached_property
    def text(self) -> str:
        return self.compiled.as_text() or ""


def lower_step(setup: Setup) -> Step:
    """Lower the train step, with the matmul precision of train.py."""
    mesh = sharding.make_mesh(setup.fsdp)
    task, batch_size = _make_task(setup, mesh), setup.per_device_batch * mesh.size
    rate = warmup_cosine(peak=1.5e-4 * batch_size / 256, warmup_steps=40, total_steps=800)
    tx = adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    shapes = jax.eval_shape(lambda key: init_state(task, tx, key), jax.random.key(0))
    shardings = sharding.state_shardings(shapes, mesh, setup.min_split_bytes)
    sharding.check_sharded(shapes, shardings, mesh, sharding.MAX_REPLICATED)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    images = jax.ShapeDtypeStruct((batch_size, setup.image_size, setup.image_size, 3), jnp.uint8)
    batch = {"image": place(images, NamedSharding(mesh, sharding.BATCH_SPEC))}
    step = jit_step(make_train_step(task, tx, rate, jax.random.key(1)), shardings)
    with jax.default_matmul_precision("default"):
        lowered = step.lower(jax.tree.map(place, shapes, shardings), batch)
    return Step(setup, task, mesh, shapes, shardings, lowered)


def _make_task(setup: Setup, mesh: Mesh) -> Pretrain:
    constraint = sharding.batch_constraint(mesh) if setup.shard_activations else lambda x: x
    execution = ExecutionConfig(
        dtype=DTYPES[setup.dtype],
        remat=setup.remat,
        scan_unroll=setup.scan_unroll,
        shard_activations=constraint,
    )
    patch = setup.size.patch
    grid = patch_grid((setup.image_size, setup.image_size), patch)
    model = make_mae(setup.size, grid=grid, execution=execution)
    return Pretrain(model=model, grid=grid, patch=patch, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def measure(step: Step) -> dict[str, int]:
    """Return the counts that have budgets."""
    traffic = collectives(step.text)
    total = lambda kind: sum(each.bytes * each.runs for each in traffic if each.kind == kind)
    return {
        **count_kinds(step.text),
        "float32_product": sum(runs for dtypes, runs in products(step.text) if "f32" in dtypes),
        "temp_bytes": step.compiled.memory_analysis().temp_size_in_bytes,
        **{f"{kind.replace('-', '_')}_bytes": total(kind) for kind in COLLECTIVES},
    }


def non_parameter_sizes(step: Step) -> set[int]:
    """Return sizes of arrays in collectives that are neither scalars nor as large as a parameter.

    That is a parameter of all blocks or of one, or the part of it on a device.
    """
    known = {1}
    params, shardings = step.shapes.params, step.shardings.params
    for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(shardings)):
        for shape in (leaf.shape, where.shard_shape(leaf.shape)):
            known |= {math.prod(shape), math.prod(shape[1:])}
    return {size for each in collectives(step.text) for size in each.sizes} - known


def train_flops(setup: Setup) -> tuple[float, float]:
    """Return the FLOPs of a step on the global batch: by XLA, and analytically.

    The program is lowered without loops, whose body XLA would count once.
    """
    depth = max(setup.size.depth, setup.size.decoder_depth)
    step = lower_step(dataclasses.replace(setup, scan_unroll=depth, remat="none"))
    task, variant = step.task, setup.size
    n, kept, values = task.num_patches, task.num_kept, task.patch**2 * 3
    # Only kept patches are embedded, and the head sees only masked ones.
    forward = flops.forward_flops(variant, n, kept, values)
    forward -= flops.patch_embed_flops(variant, n - kept, values)
    forward -= 2 * (kept + 1) * variant.decoder_width * values
    analytic = 3 * forward - flops.patch_embed_flops(variant, kept, values)
    batch_size = setup.per_device_batch * step.mesh.size
    return step.lowered.cost_analysis()["flops"], batch_size * analytic


# Commands


def jax_version() -> str:
    """Return the minor version, as in "0.10"."""
    return ".".join(jax.__version__.split(".")[:2])


def read_budgets() -> dict[str, dict[str, dict[str, int]]]:
    """Return counts by jax version and recorded step."""
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def record() -> None:
    """Write the budgets of the installed jax version."""
    counts = {name: measure(lower_step(setup)) for name, setup in RECORDED.items()}
    write_json(BUDGETS, dict(sorted((read_budgets() | {jax_version(): counts}).items())))


def report(step: Step) -> dict[str, Any]:
    """Return everything known of a train step without running it."""
    memory = step.compiled.memory_analysis()
    params = jax.tree.leaves(step.shapes.params)
    return {
        **measure(step),
        "argument_bytes": memory.argument_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "params_bytes": sum(x.size * x.dtype.itemsize for x in params),
        "non_parameter_sizes": sorted(non_parameter_sizes(step)),
    }


def main(argv: list[str]) -> None:
    parser = make_parser("tests.compiled_step", __doc__)
    parser.add_argument("--size", choices=variants.VARIANTS, default="vit_ti16")
    parser.add_argument("--per-device-batch", type=positive_int, default=32, help="images (32)")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of activations (f32)")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="none")
    parser.add_argument("--devices", type=positive_int, default=4, help="virtual devices (4)")
    parser.add_argument("--fsdp", type=positive_int, default=1, help="mesh.fsdp (1)")
    parser.add_argument("--record", action="store_true", help="write tests/step_budgets.json")
    flags = vars(parser.parse_args(argv))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", flags.pop("devices"))
    if flags.pop("record"):
        record()
        return
    setup = Setup(size=variants.get_variant(flags.pop("size")), **flags)
    print(json.dumps(report(lower_step(setup)), indent=2))


if __name__ == "__main__":
    run_command(main)
