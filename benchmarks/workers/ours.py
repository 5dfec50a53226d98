"""The worker of mae_jax: makes weights and images for all, and runs train.py's very step on them.

    python -m benchmarks.workers.ours PLAN.json

`benchmarks.step` starts it and writes the plan.
"""

import itertools
import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load_file, save_file

from benchmarks import agreement
from benchmarks.machine import versions
from benchmarks.workers import ceiling
from benchmarks.workers.protocol import UnusableError, burst, serve
from mae_jax.convert import hf_timm, state_dict
from mae_jax.convert.model_info import ModelInfo
from mae_jax.models import attention_autotune
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid, sincos_pos_embed_2d
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.optimizer import adamw
from mae_jax.tasks.pretrain import Params, Pretrain
from mae_jax.tasks.train_step import TrainState, init_state, jit_step, make_train_step
from mae_jax.utils.pytree import flatten

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "jax-cuda12-plugin")
PACKAGES += ("jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
BATCHES = 4  # different ones, which take turns
NOISE = 0.02  # deviation of what is added to all parameters, of which many begin as zeros or ones
Plan = dict[str, Any]


def make_task(plan: Plan) -> Pretrain:
    """The paper's pretraining, computed as the flags say, with attention as a run chooses it."""
    dtype = DTYPES[plan["dtype"]]
    shapes = _make_task(plan, AttentionImpl()).attention_shapes
    try:
        attend = attention_autotune.select_implementation(plan["attention"], shapes, dtype)
    except ValueError as error:
        raise UnusableError(f"--attention {plan['attention']}: {error}") from error
    return _make_task(plan, attend)


def _make_task(plan: Plan, attend: AttentionImpl) -> Pretrain:
    execution = ExecutionConfig(
        dtype=DTYPES[plan["dtype"]],
        remat=plan["remat"],
        scan_unroll=plan["scan_unroll"],
        attend=attend,
    )
    size = VARIANTS[plan["size"]]
    grid = patch_grid((plan["image_size"],) * 2, size.patch)
    model = make_mae(size, grid=grid, execution=execution)
    pixels = {name: tuple(plan[name]) for name in ("mean", "std")}
    return Pretrain(model=model, grid=grid, patch=size.patch, **pixels)


def make_params(task: Pretrain) -> Params:
    """Fresh parameters, on the host; none are all zeros or all ones, so every mistake shows."""
    rng, fresh = np.random.default_rng(1), jax.jit(task.init)(jax.random.key(0))
    shift = lambda x: np.asarray(x) + NOISE * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(shift, fresh)


def make_images(plan: Plan) -> list[Array]:
    """Batches of random pixels on the device; the peers find the same in a file."""
    side, rng = plan["image_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCHES, plan["batch"], side, side, 3), np.uint8)
    np.save(Path(plan["folder"]) / "images.npy", images)
    return [jnp.asarray(batch) for batch in images]


# What the peers take


def make_info(plan: Plan) -> ModelInfo:
    """What has to be told of the weights beside them."""
    size = VARIANTS[plan["size"]]
    return ModelInfo(
        source="mae_jax",
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        mlp_ratio=4.0,
        patch=size.patch,
        image_size=(plan["image_size"],) * 2,
        channels=3,
        layer_norm_eps=1e-6,
        target="normalized",
        mean=tuple(plan["mean"]),
        std=tuple(plan["std"]),
        decoder_width=size.decoder_width,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
    )


def write_weights(folder: Path, params: Params, plan: Plan) -> None:
    """The same weights for every peer, each in a folder named after its dialect.

    Peers also keep the position tables, which we compute.
    """
    info = make_info(plan)
    arrays = flatten(params)
    for part, width in (("encoder", info.width), ("decoder", info.decoder_width)):
        arrays[f"{part}/pos_embed/table"] = sincos_pos_embed_2d(width, info.grid)[None]
    beside = {
        "hf": hf_timm.hf_config(info),
        "timm": hf_timm.timm_model_args(info),
        "official": vars(VARIANTS[plan["size"]]),
    }
    for dialect in set(plan["peers"].values()):
        (folder / dialect).mkdir()
        layout = state_dict.select_layout(dialect, arrays)
        tensors = state_dict.export_state_dict(layout, dict(arrays), info.patch)
        save_file(tensors, folder / dialect / "model.safetensors", {"format": "pt"})
        (folder / dialect / "config.json").write_text(json.dumps(beside[dialect]))


def read_weights(path: Path, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A peer's weights by our names; tensors that we have no parameter for are passed over."""
    tensors = load_file(path)
    layout = state_dict.detect_layout(tensors, None, str(path))
    shapes = {name: array.shape for name, array in like.items()}
    return state_dict.import_state_dict(layout, shapes, tensors)


def save_params(path: Path, params: Params) -> None:
    """Writes parameters by our names."""
    save_file({name: np.asarray(leaf) for name, leaf in flatten(params).items()}, path)


# What is measured


class Training:
    """The train step on rotating batches; it draws the masks itself, as in train.py."""

    def __init__(self, task: Pretrain, params: Params, images: list[Array], plan: Plan):
        self._task, self._images, self._key = task, images, jax.random.key(2)
        # A first step that shows, and then such small ones that a long run on noise stays finite.
        rate = lambda step: jnp.where(step == 0, plan["first_rate"], plan["rate"])
        recipe = {name: plan[name] for name in ("b1", "b2", "eps", "weight_decay")}
        tx = adamw(rate, **recipe)
        start = lambda params: replace(init_state(task, tx, self._key), params=params)
        self._state: TrainState = jax.jit(start)(params)
        self._step = jit_step(make_train_step(task, tx, rate, self._key))
        self._turns = itertools.cycle(images)
        self._metrics: dict[str, Array] = {}

    def run(self) -> None:
        self._state, self._metrics = self._step(self._state, {"image": next(self._turns)})

    def wait(self) -> None:
        jax.block_until_ready((self._state, self._metrics))

    def noise(self, step: int) -> np.ndarray:
        """Noise [b, n] that makes the masks which the step of that number draws."""
        key = jax.random.fold_in(self._key, step)
        mask = self._task.draw_mask(key, len(self._images[0]))
        order = np.concatenate([np.asarray(part) for part in mask], axis=1)
        return np.argsort(order, axis=1).astype(np.float32) / order.shape[1]

    def loss(self) -> float:
        """Of the last step."""
        return float(self._metrics["loss"])

    def check(self, folder: Path) -> dict[str, float]:
        """Seconds, loss and gradient norm of the first step, and the loss of the next batch after.

        The parameters between the two go to a file.
        """
        seconds = burst(self, 1)["wall"]
        found = {"first_s": seconds, "loss": self.loss()}
        found["grad_norm"] = float(self._metrics["grad_norm"])
        save_params(folder / "after.safetensors", self._state.params)
        self.run()
        return found | {"next_loss": self.loss()}


class Encoding:
    """The encoder on whole images, from uint8 pixels to the tokens after its last norm."""

    def __init__(self, task: Pretrain, params: Params, images: list[Array], plan: Plan):
        encode = lambda params, x: task.apply("encode", params, task.to_patches(x))
        # As the peers' weights, and so that nobody has to cast them anew in every step.
        self._params = jax.tree.map(lambda x: jnp.asarray(x, DTYPES[plan["dtype"]]), params)
        self._encode, self._turns = jax.jit(encode), itertools.cycle(images)
        self._in_order = jax.default_backend() == "cpu"  # which would compute several at once
        self.tokens = jnp.zeros(())

    def run(self) -> None:
        self.tokens = self._encode(self._params, next(self._turns))
        if self._in_order:
            self.wait()

    def wait(self) -> None:
        jax.block_until_ready(self.tokens)

    def check(self, folder: Path) -> dict[str, float]:
        """Seconds of the first step; the tokens of the first batch go to a file."""
        seconds = burst(self, 1)["wall"]
        np.save(folder / "tokens.npy", np.asarray(self.tokens, np.float32))
        return {"first_s": seconds}

    def loss(self) -> float:
        """Not a loss, but as finite as the tokens are."""
        return float(jnp.square(self.tokens.astype(jnp.float32)).mean())


class Ours:
    """The commands of this worker."""

    def __init__(self, plan: Plan):
        self._plan, self._folder = plan, Path(plan["folder"])
        device = jax.devices()[0]
        if plan["dtype"] == "f32" and device.platform != "cpu":
            jax.config.update("jax_default_matmul_precision", "highest")  # else it may be tf32
        self._device = device

    def commands(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "describe": self.describe,
            "check": self.check,
            "compare": self.compare,
            "ceiling": lambda: ceiling.measure(DTYPES[self._plan["dtype"]]),
            "burst": lambda steps: burst(self._job, steps),
            "finish": lambda: {"loss": self._job.loss()},
        }

    def describe(self) -> dict[str, Any]:
        return {
            "platform": self._device.platform,
            "device": self._device.device_kind,
            "versions": versions(PACKAGES),
            "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        }

    def check(self) -> dict[str, Any]:
        """Makes everything, takes the first steps, and writes what the peers need for theirs."""
        plan, folder = self._plan, self._folder
        task, train = make_task(plan), plan["task"] == "train"
        params = make_params(task)
        write_weights(folder, params, plan)
        params = params if train else {"encoder": params["encoder"]}
        save_params(folder / "before.safetensors", params)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._job = (Training if train else Encoding)(task, params, make_images(plan), plan)
        if isinstance(self._job, Training):
            np.save(folder / "noise.npy", [self._job.noise(step) for step in range(2)])
        return {"parameters": count, **self._job.check(folder), "peak_bytes": self._peak_bytes()}

    def _peak_bytes(self) -> int:
        """Most memory used so far: of the device, or on a CPU of the process."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use", resident)

    def compare(self, name: str) -> dict[str, float]:
        """How far a peer's first step, or its tokens, are from ours."""
        folder = self._folder
        if isinstance(self._job, Encoding):
            found, expected = (np.load(folder / each) for each in (f"{name}.npy", "tokens.npy"))
            return {"tokens": agreement.relative(found, expected)}
        before, ours = (load_file(folder / f"{when}.safetensors") for when in ("before", "after"))
        theirs = read_weights(folder / f"{name}.safetensors", before)
        return agreement.compare_updates(before, ours, theirs)


if __name__ == "__main__":
    serve(lambda: Ours(json.loads(Path(sys.argv[1]).read_text())).commands())
