"""Compile what train.py runs for an accelerator that is not here, and report its cost.

    python -m benchmarks.compile --target h200 --size vit_b16 --batch 256
    python -m benchmarks.compile --target h200 --size vit_l16 --batch 64 --devices 8 --fsdp 8
    python -m benchmarks.compile --target v5e:2x2 --size vit_b16 --batch 64

Prints memory per device, kernels, bytes, FLOPs, a roofline by category, the longest kernels and the
collectives. The compilers are those of the accelerators, but nothing runs: times are bounds by
bandwidth and FLOP/s (benchmarks/roofline.py), which compare programs; they are no measurements.
"""

import os

os.environ.setdefault("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"  # kernels cannot be timed without a device

import argparse
import importlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from benchmarks import roofline
from benchmarks.targets import NAMES, Target, compile_for, get_target
from mae_jax.distributed import sharding
from mae_jax.models import flops
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.layers import REMAT_POLICIES
from mae_jax.models.patches import num_patch_values
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.train_step import jit_step, make_train_step
from mae_jax.train import build_data, build_model
from mae_jax.train.config import Config, from_config_dict
from mae_jax.train.init_state import make_state_layout, split_rng
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cli import (
    check_output,
    make_parser,
    path_argument,
    positive_int,
    run_command,
)
from mae_jax.utils.errors import UserError

RECIPES = {"pretrain": "pretrain", "pixio": "pixio", "finetune": "finetune", "probe": "linprobe"}
TASKS = (*RECIPES, "features")
CLASSES = tuple(map(str, range(1000)))
STEPS_PER_EPOCH = 1000
LONGEST = 15  # kernels to print


def load_config(task: str, size: str, batch_size: int, overrides: dict[str, Any]) -> Config:
    """Return the config of a recipe; features are those of the pretraining recipe."""
    recipe = importlib.import_module(f"configs.{RECIPES.get(task, 'pretrain')}").get_config(size)
    recipe.batch_size = batch_size
    for key, value in overrides.items():
        if value is not None:
            recipe.update_from_flattened_dict({key: value})
    return from_config_dict(recipe)


def fused_attention(config: Config, mesh: jax.sharding.Mesh, target: Target) -> AttentionImpl:
    """Return the attention implementation that train.py selects on the target."""
    is_gpu = target.capability >= (8, 0)
    if config.model.attention == "cudnn" and not is_gpu:
        raise UserError("needs an NVIDIA GPU", key="--attention", value="cudnn")
    if config.model.attention == "xla" or config.model.dtype != "bfloat16":
        return AttentionImpl()
    shapes = build_model.make_task(config, mesh, CLASSES).attention_shapes
    return AttentionImpl(frozenset(shapes), "cudnn" if is_gpu else "tpu")


def lower(config: Config, task_name: str, mesh: jax.sharding.Mesh, target: Target) -> Any:
    """Lower the train step of a config, or its features of full images."""
    attention = fused_attention(config, mesh, target)
    task = build_model.make_task(config, mesh, CLASSES, attention)
    length = build_model.make_run_length(config, STEPS_PER_EPOCH * config.batch_size)
    rate = build_model.make_learning_rate(config, length)
    tx = build_model.make_optimizer(config, rate, getattr(task, "train_last_blocks", None))
    layout = make_state_layout(config, task, tx, mesh)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    state = jax.tree.map(place, layout.shapes, layout.shardings)
    batch = make_batch(config, mesh)
    if task_name == "features":
        return jax.jit(task.features).lower(state.params, batch["image"])
    step = make_train_step(
        task,
        tx,
        rate,
        split_rng(config.seed)[1],
        preprocess=build_data.make_device_preprocess(config, mesh, "crop" in batch),
        grad_accum_steps=config.accumulate,
        ema_decay=config.optim.ema,
    )
    return jit_step(step, layout.shardings).lower(state, batch)


def make_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of uint8 images, or of crops that the devices resize."""
    model, data = config.model, config.data
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((), jnp.int32)}
    if data.resize_on == "device":
        crop = (data.canvas, data.canvas, model.channels)
        shapes |= {"crop": (crop, jnp.uint8), "crop_size": ((2,), jnp.int32)}
        shapes |= {"flip": ((), jnp.bool_)}
    else:
        shapes["image"] = ((*model.image_size, model.channels), jnp.uint8)
    where = NamedSharding(mesh, sharding.BATCH_SPEC)
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def compile_program(flags: argparse.Namespace) -> dict[str, Any]:
    """Compile a program, and return everything that is known of it."""
    target, begin = get_target(flags.target), time.monotonic()
    with compile_for(flags.target, flags.devices) as devices:
        mesh = sharding.make_mesh(flags.fsdp, devices)
        overrides = {
            "model.remat": flags.remat,
            "model.scan_unroll": flags.scan_unroll,
            "model.depth": flags.blocks,
            "model.decoder_depth": flags.blocks,
            "model.attention": flags.attention,
            "mesh.fsdp": flags.fsdp,
            "data.resize_on": "device" if flags.resize_on_device else None,
        }
        config = load_config(flags.task, flags.size, flags.batch * len(devices), overrides)
        with jax.default_matmul_precision("default"):
            lowered = lower(config, flags.task, mesh, target)
        compiled = lowered.compile()
    if flags.text:
        flags.text.write_text(compiled.as_text())
    report = describe(compiled, target)
    model_flops = flags.batch * flops_per_image(config, flags.task, mesh)
    report["mfu_bound"] = model_flops / (target.peak * report["seconds"])
    report["compile_s"] = time.monotonic() - begin
    report["jax"] = jax.__version__
    settings = {name: value for name, value in vars(flags).items() if name not in ("text", "json")}
    return settings | {"devices": len(devices)} | report


def flops_per_image(config: Config, task_name: str, mesh: jax.sharding.Mesh) -> float:
    """Return the model FLOPs per image: of a training step, or of the encoder for features."""
    task = build_model.make_task(config, mesh, CLASSES)
    if task_name != "features":
        return build_model.flops_per_image(config, task)
    variant, num_patches = build_model.make_variant(config), task.num_patches
    patch_values = num_patch_values(variant.patch, config.model.channels)
    return flops.encoder_flops(variant, num_patches, num_patches, patch_values)


def describe(compiled: Any, target: Target) -> dict[str, Any]:
    """Return memory, kernels, roofline and collectives of a compiled program, per device."""
    memory = compiled.memory_analysis()
    timed, collectives = roofline.analyze(compiled.as_text(), target)
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    exposed = sum(each.exposed for each in collectives)
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "donated": memory.alias_size_in_bytes,
            "held": held,
            "fits": held <= 0.92 * target.memory,  # a process may use that much
        },
        "kernels": sum(each.runs for each in timed),
        "bytes": sum(each.kernel.bytes * each.runs for each in timed),
        "flops": sum(each.kernel.flops * each.runs for each in timed),
        "seconds": sum(each.seconds for each in timed) + exposed,
        "categories": roofline.by_category(timed),
        "longest": roofline.longest(timed, LONGEST),
        "collectives": roofline.by_kind(collectives),
    }


def print_report(report: dict[str, Any], target: Target) -> None:
    """Print the tables of a program."""
    memory = {name: f"{value / 1e9:.2f} GB" for name, value in report["memory"].items()}
    fits = "fits" if report["memory"]["fits"] else "does not fit"
    print(
        f"{report['task']} {report['size']}, {report['batch']} images per device, "
        f"{report['devices']} x {target.device_kind}; compiled in {report['compile_s']:.0f} s, "
        f"not run\nmemory per device: {memory['held']}, {fits} in {target.memory / 1e9:.0f} GB "
        f"(arguments {memory['arguments']}, temporaries {memory['temporaries']}, "
        f"donated {memory['donated']})\n{report['kernels']} kernels, "
        f"{report['bytes'] / 1e9:.1f} GB moved, {report['flops'] / 1e12:.2f} TFLOP in products\n"
        f"estimated {1e3 * report['seconds']:.1f} ms, MFU at most {report['mfu_bound']:.3f} of "
        f"{target.peak / 1e12:.0f} TFLOP/s\n"
    )
    print(f"{'category':14}{'ms':>8}{'GB':>9}{'TFLOP':>8}{'kernels':>9}")
    for name, row in report["categories"].items():
        print(
            f"{name:14}{1e3 * row['seconds']:8.2f}{row['bytes'] / 1e9:9.2f}"
            f"{row['flops'] / 1e12:8.2f}{row['kernels']:9d}"
        )
    print(f"\n{'longest kernels':28}{'ms':>8}{'runs':>6}{'MB each':>9}  operation")
    for row in report["longest"]:
        print(
            f"{row['kernel'][:27]:28}{1e3 * row['seconds']:8.2f}{row['runs']:6d}"
            f"{row['bytes'] / 1e6:9.1f}  {short_path(row['op_name'])}"
        )
    if report["collectives"]:
        print(f"\n{'collectives':20}{'dtype':>10}{'runs':>6}{'GB':>8}{'ms':>8}{'exposed':>9}")
    for row in report["collectives"]:
        print(
            f"{row['kind']:20}{row['dtypes']:>10}{row['runs']:6d}{row['bytes'] / 1e9:8.2f}"
            f"{1e3 * row['seconds']:8.2f}{1e3 * row['exposed']:9.2f}"
        )


def short_path(op_name: str) -> str:
    """Return the direction and the end of the path of an operation."""
    direction = "backward" if "transpose(" in op_name else "forward"
    scopes = [part for part in op_name.split("/") if not re.search(r"[(]|jaxpr|closed_call", part)]
    names = dict.fromkeys(scope.split(".")[0] for scope in scopes)  # methods of modules: qkv.split
    return f"{direction} {'/'.join(names)[-60:]}"


def main(argv: list[str]) -> None:
    parser = make_parser("benchmarks.compile", __doc__)
    parser.add_argument("--target", required=True, help=f"{', '.join(NAMES)}, or v5e:4x4 and so on")
    parser.add_argument("--size", choices=VARIANTS, default="vit_b16")
    parser.add_argument("--batch", type=positive_int, default=64, help="images per device (64)")
    parser.add_argument("--task", choices=TASKS, default="pretrain")
    parser.add_argument("--devices", type=positive_int, default=1, help="GPUs (1), in hosts of 8")
    parser.add_argument("--fsdp", type=positive_int, default=1, help="mesh.fsdp (1)")
    parser.add_argument("--remat", choices=REMAT_POLICIES, help="model.remat")
    parser.add_argument("--blocks", type=positive_int, help="of encoder and decoder each (all)")
    parser.add_argument("--scan-unroll", type=positive_int, help="model.scan_unroll")
    parser.add_argument("--attention", choices=("auto", "xla", "cudnn"), help="model.attention")
    parser.add_argument("--resize-on-device", action="store_true", help="data.resize_on=device")
    parser.add_argument("--text", type=path_argument, help="write the compiled program to a file")
    parser.add_argument("--json", type=path_argument, help="write everything to a file")
    flags = parser.parse_args(argv)
    for flag, path, suffix in (("--text", flags.text, ".txt"), ("--json", flags.json, ".json")):
        if path:
            check_output(flag, path, suffix)
    report = compile_program(flags)
    print_report(report, get_target(flags.target))
    if flags.json:
        write_json(flags.json, report)


if __name__ == "__main__":
    run_command(main)
