"""Worker for mae_jax: creates weights and images for all implementations, runs the train step.

    python -m benchmarks.jax_worker PLAN.json

Started by `benchmarks.step`, which writes the plan.
"""

import itertools
import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load_file, save_file

from benchmarks import parity
from benchmarks.environment import versions
from benchmarks.rpc import UnusableError, serve, time_steps
from mae_jax.convert import hf_timm, state_dict
from mae_jax.convert.model_info import ModelInfo
from mae_jax.models import attention_selection
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid, sincos_pos_embed_2d
from mae_jax.models.variants import VARIANTS
from mae_jax.tasks.optimizer import adamw
from mae_jax.tasks.pretrain import Params, Pretrain
from mae_jax.tasks.train_step import TrainState, init_state, jit_step, make_train_step
from mae_jax.utils.errors import UserError
from mae_jax.utils.host_memory import keep_freed_memory_on_cpu
from mae_jax.utils.pytree import flatten

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "jax-cuda12-plugin")
PACKAGES += ("jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
NUM_BATCHES = 4  # different ones, used in turn
PARAM_NOISE = 0.02  # standard deviation added to all parameters, many of which start at 0 or 1
Plan = dict[str, Any]


def make_task(plan: Plan) -> Pretrain:
    """Return the paper's pretraining task, with attention selected as train.py does."""
    dtype = DTYPES[plan["dtype"]]
    shapes = _make_task(plan, AttentionImpl()).attention_shapes
    try:
        attention = attention_selection.select_implementation(plan["attention"], shapes, dtype)
    except (UserError, ValueError) as error:
        raise UnusableError(f"--attention {plan['attention']}: {error}") from error
    return _make_task(plan, attention)


def _make_task(plan: Plan, attention: AttentionImpl) -> Pretrain:
    execution = ExecutionConfig(
        dtype=DTYPES[plan["dtype"]],
        remat=plan["remat"],
        scan_unroll=plan["scan_unroll"],
        attention=attention,
    )
    variant = VARIANTS[plan["size"]]
    grid = patch_grid((plan["image_size"],) * 2, variant.patch)
    model = make_mae(variant, grid=grid, execution=execution)
    stats = {name: tuple(plan[name]) for name in ("mean", "std")}
    return Pretrain(model=model, grid=grid, patch=variant.patch, **stats)


def make_params(task: Pretrain) -> Params:
    """Return random parameters on the host; with noise, so that swapped ones are detected."""
    rng, params = np.random.default_rng(1), jax.jit(task.init)(jax.random.key(0))
    perturb = lambda x: np.asarray(x) + PARAM_NOISE * rng.standard_normal(x.shape, np.float32)
    return jax.tree.map(perturb, params)


def make_images(plan: Plan) -> list[Array]:
    """Return batches of random pixels on the device, and save them for the peers."""
    side, rng = plan["image_size"], np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_BATCHES, plan["batch"], side, side, 3), np.uint8)
    np.save(Path(plan["folder"]) / "images.npy", images)
    return [jnp.asarray(batch) for batch in images]


# Weights for the peers


def make_info(plan: Plan) -> ModelInfo:
    """Return the metadata of the exported weights."""
    return ModelInfo(
        source="mae_jax",
        image_size=(plan["image_size"],) * 2,
        channels=3,
        layer_norm_eps=1e-6,
        target="normalized",
        mean=tuple(plan["mean"]),
        std=tuple(plan["std"]),
        **asdict(VARIANTS[plan["size"]]),
    )


def export_weights(folder: Path, params: Params, plan: Plan) -> None:
    """Write the same weights in the format of every peer, one folder per format.

    Peers also store the position embeddings, which mae_jax computes.
    """
    info = make_info(plan)
    arrays = flatten(params)
    for part, width in (("encoder", info.width), ("decoder", info.decoder_width)):
        arrays[f"{part}/pos_embed/table"] = sincos_pos_embed_2d(width, info.grid)[None]
    configs = {
        "hf": hf_timm.hf_config(info),
        "timm": hf_timm.timm_model_args(info),
        "official": asdict(VARIANTS[plan["size"]]),
    }
    for library in set(plan["peers"].values()):
        (folder / library).mkdir()
        layout = state_dict.select_layout(library, arrays)
        tensors = state_dict.export_state_dict(layout, dict(arrays), info.patch)
        save_file(tensors, folder / library / "model.safetensors", {"format": "pt"})
        (folder / library / "config.json").write_text(json.dumps(configs[library]))


def import_weights(path: Path, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a peer's weights by parameter path; tensors without a parameter are ignored."""
    tensors = load_file(path)
    layout = state_dict.detect_layout(tensors, None, str(path))
    shapes = {name: array.shape for name, array in like.items()}
    return state_dict.import_state_dict(layout, shapes, tensors)


def save_params(path: Path, params: Params) -> None:
    """Write parameters by their paths."""
    save_file({name: np.asarray(leaf) for name, leaf in flatten(params).items()}, path)


# Jobs to time


class Training:
    """The train step on rotating batches; it samples the masks itself, as in train.py."""

    def __init__(self, task: Pretrain, params: Params, images: list[Array], plan: Plan):
        self._task, self._images, self._key = task, images, jax.random.key(2)
        # A first step of visible size, then tiny ones, so that long runs on noise stay finite.
        rate = lambda step: jnp.where(step == 0, plan["first_rate"], plan["rate"])
        tx = adamw(rate, **{name: plan[name] for name in ("b1", "b2", "eps", "weight_decay")})
        init = lambda params: replace(init_state(task, tx, self._key), params=params)
        self._state: TrainState = jax.jit(init)(params)
        self._step = jit_step(make_train_step(task, tx, rate, self._key))
        self._batches = itertools.cycle(images)
        self._metrics: dict[str, Array] = {}

    def run(self) -> None:
        self._state, self._metrics = self._step(self._state, {"image": next(self._batches)})

    def wait(self) -> None:
        jax.block_until_ready((self._state, self._metrics))

    def noise(self, step: int) -> np.ndarray:
        """Return noise [b, n] whose ranking gives the masks that the train step samples."""
        key = jax.random.fold_in(self._key, step)
        mask = self._task.sample_mask(key, len(self._images[0]))
        order = np.concatenate([np.asarray(part) for part in mask], axis=1)
        return np.argsort(order, axis=1).astype(np.float32) / order.shape[1]

    def loss(self) -> float:
        """Return the loss of the last step."""
        return float(self._metrics["loss"])

    def check(self, folder: Path) -> dict[str, float]:
        """Return seconds, loss and gradient norm of the first step, and the loss of the second.

        The parameters after the first step are saved.
        """
        seconds = time_steps(self, 1)["wall"]
        result = {"first_s": seconds, "loss": self.loss()}
        result["grad_norm"] = float(self._metrics["grad_norm"])
        save_params(folder / "after.safetensors", self._state.params)
        self.run()
        return result | {"next_loss": self.loss()}


class Encoding:
    """The encoder on all patches, from uint8 pixels to the tokens after its last norm."""

    def __init__(self, task: Pretrain, params: Params, images: list[Array], plan: Plan):
        encode = lambda params, x: task.apply("encode", params, task.to_patches(x))
        # Cast once, as the weights of the peers, and not in every step.
        self._params = jax.tree.map(lambda x: jnp.asarray(x, DTYPES[plan["dtype"]]), params)
        self._encode, self._batches = jax.jit(encode), itertools.cycle(images)
        self._synchronous = jax.default_backend() == "cpu"  # which would run steps concurrently
        self.tokens = jnp.zeros(())

    def run(self) -> None:
        self.tokens = self._encode(self._params, next(self._batches))
        if self._synchronous:
            self.wait()

    def wait(self) -> None:
        jax.block_until_ready(self.tokens)

    def check(self, folder: Path) -> dict[str, float]:
        """Return the seconds of the first step; the tokens of the first batch are saved."""
        seconds = time_steps(self, 1)["wall"]
        np.save(folder / "tokens.npy", np.asarray(self.tokens, np.float32))
        return {"first_s": seconds}

    def loss(self) -> float:
        """Return the mean square of the tokens, to detect NaN/Inf."""
        return float(jnp.square(self.tokens.astype(jnp.float32)).mean())


class JaxWorker:
    """The commands of this worker."""

    def __init__(self, plan: Plan):
        self._plan, self._folder = plan, Path(plan["folder"])
        keep_freed_memory_on_cpu()  # as train.py
        self._device = jax.devices()[0]
        if plan["dtype"] == "f32" and self._device.platform != "cpu":
            jax.config.update("jax_default_matmul_precision", "highest")  # no TF32

    def commands(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "describe": self.describe,
            "check": self.check,
            "compare": self.compare,
            "burst": lambda steps: time_steps(self._job, steps),
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
        """Create weights, images and masks for all workers, and run the first steps."""
        plan, folder = self._plan, self._folder
        task, train = make_task(plan), plan["task"] == "train"
        params = make_params(task)
        export_weights(folder, params, plan)
        params = params if train else {"encoder": params["encoder"]}
        save_params(folder / "before.safetensors", params)
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._job = (Training if train else Encoding)(task, params, make_images(plan), plan)
        if isinstance(self._job, Training):
            np.save(folder / "noise.npy", [self._job.noise(step) for step in range(2)])
        return {"parameters": count, **self._job.check(folder), "peak_bytes": self._peak_bytes()}

    def _peak_bytes(self) -> int:
        """Return the peak memory of the device, or on a CPU of the process."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use", resident)

    def compare(self, name: str) -> dict[str, float]:
        """Return how much a peer's first update, or its tokens, differ from those of mae_jax."""
        folder = self._folder
        if isinstance(self._job, Encoding):
            tokens = np.load(folder / f"{name}.npy")
            return {"tokens": parity.relative_error(tokens, np.load(folder / "tokens.npy"))}
        before, ours = (load_file(folder / f"{when}.safetensors") for when in ("before", "after"))
        theirs = import_weights(folder / f"{name}.safetensors", before)
        return parity.compare_updates(before, ours, theirs)


if __name__ == "__main__":
    serve(lambda: JaxWorker(json.loads(Path(sys.argv[1]).read_text())).commands())
