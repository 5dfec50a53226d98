"""Worker for a PyTorch peer: the same work on the same weights, images and masks as mae_jax.

    python -m benchmarks.torch_worker {hf,timm,official}[_compile] PLAN.json

Started by `benchmarks.step`, which writes the plan; weights and images come from the worker of
mae_jax. Peers run in their fastest form: fused attention, fused AdamW, gradients set to None, no
device-to-host copies in a step; in bfloat16, autocast for training and bfloat16 weights for
encoding.
"""

import itertools
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import versions
from benchmarks.rpc import UnusableError, serve, time_steps

try:
    import torch
    from safetensors.torch import save_file

    from benchmarks import torch_models
except ImportError as error:
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None

PACKAGES = ("torch", "transformers", "timm", "torchvision", "numpy", "triton", "safetensors")
Plan = dict[str, Any]


def to_device(images: np.ndarray, plan: Plan, device: Any, dtype: Any) -> list[Any]:
    """Return uint8 batches [b, h, w, c] as normalized [b, c, h, w] on the device."""
    mean, std = (torch.tensor(plan[name])[:, None, None] for name in ("mean", "std"))
    batches = []
    for batch in images:
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2) / 255
        batches.append(((pixels - mean) / std).contiguous().to(device, dtype))
    return batches


class Training:
    """The train step of a model (images, noise) -> loss, on rotating batches."""

    def __init__(self, model: Any, compiled: Any, images: list[Any], plan: Plan):
        self._model, self._compiled, self._plan = model, compiled, plan
        self._batches, self._device = itertools.cycle(images), images[0].device
        self._trained = [p for p in model.parameters() if p.requires_grad]
        # Biases and norms are not decayed, as in the official recipe.
        matrices, vectors = ([p for p in self._trained if (p.ndim > 1) == x] for x in (True, False))
        groups = [
            {"params": matrices, "weight_decay": plan["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = plan["b1"], plan["b2"]
        self._optimizer = torch.optim.AdamW(
            groups, lr=plan["first_rate"], betas=betas, eps=plan["eps"], fused=True
        )
        self._loss: Any = None

    def run(self) -> None:
        images = next(self._batches)
        noise = torch.rand(len(images), self._plan["patches"], device=self._device)
        self._backward(images, noise)
        self._update()

    def _backward(self, images: Any, noise: Any) -> None:
        half = self._plan["dtype"] == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            loss = self._compiled(images, noise)
        loss.backward()
        self._loss = loss.detach()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        synchronize(self._device)

    def loss(self) -> float:
        """Return the loss of the last step."""
        return self._loss.item()

    def check(self, folder: Path, name: str) -> dict[str, float]:
        """Run the first two steps on the masks that mae_jax sampled; see its worker."""
        noise = [torch.from_numpy(x).to(self._device) for x in np.load(folder / "noise.npy")]
        start = time.perf_counter()
        self._backward(next(self._batches), noise[0])
        result = {"loss": self.loss()}
        seconds = time.perf_counter() - start
        result["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in self._trained]).item()
        start = time.perf_counter()
        self._update()
        self.wait()
        seconds += time.perf_counter() - start
        tensors = {
            key: x.detach().cpu().contiguous() for key, x in self._model.state_dict().items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan["rate"]
        reset_peak_memory(self._device)
        self._backward(next(self._batches), noise[1])
        self._update()
        return result | {"first_s": seconds, "next_loss": self.loss()}


class Encoding:
    """The encoder on all patches: images -> tokens after its last norm."""

    def __init__(self, model: Any, compiled: Any, images: list[Any], plan: Plan):
        self._compiled, self._batches = compiled, itertools.cycle(images)
        self._device, self._tokens = images[0].device, None

    def run(self) -> None:
        with torch.inference_mode():
            self._tokens = self._compiled(next(self._batches))

    def wait(self) -> None:
        synchronize(self._device)

    def check(self, folder: Path, name: str) -> dict[str, float]:
        """Run the first step and save its tokens; see the worker of mae_jax."""
        seconds = time_steps(self, 1)["wall"]
        np.save(folder / f"{name}.npy", self._tokens.float().cpu().numpy())
        reset_peak_memory(self._device)
        self.run()
        return {"first_s": seconds}

    def loss(self) -> float:
        """Return the mean square of the tokens, to detect NaN/Inf."""
        return self._tokens.float().square().mean().item()


def synchronize(device: Any) -> None:
    """Block until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: Any) -> None:
    """Exclude the memory of compilation from the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


class TorchWorker:
    """The commands of this worker."""

    def __init__(self, name: str, plan: Plan):
        if IMPORT_ERROR:
            raise UnusableError(
                f"{IMPORT_ERROR}; name a Python that has it by --python {name}=PATH"
            )
        self._name, self._plan, self._folder = name, plan, Path(plan["folder"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True  # as in the official recipe
        if plan["dtype"] == "f32":
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    def commands(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "describe": self.describe,
            "check": self.check,
            "burst": lambda steps: time_steps(self._job, steps),
            "finish": lambda: {"loss": self._job.loss()},
        }

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
        return {
            "platform": self._device.type,
            "device": name,
            "threads": torch.get_num_threads(),
            "versions": versions(PACKAGES),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cuda.matmul.allow_tf32": torch.backends.cuda.matmul.allow_tf32,
            "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
        }

    def check(self) -> dict[str, Any]:
        """Load the weights, and run the first steps on the given masks."""
        plan, train = self._plan, self._plan["task"] == "train"
        dtype = torch.bfloat16 if plan["dtype"] == "bf16" and not train else torch.float32
        model = torch_models.load(self._name, plan).to(self._device, dtype)
        images = to_device(np.load(self._folder / "images.npy"), plan, self._device, dtype)
        compiled = model
        if self._name.endswith("_compile"):
            compiled = torch.compile(model, mode=plan["compile_mode"], dynamic=False)
        self._job = (Training if train else Encoding)(model.train(train), compiled, images, plan)
        result = self._job.check(self._folder, self._name)
        tables = ("pos_embed", "position_embeddings")  # computed, not stored, in mae_jax
        counted = [p for name, p in model.named_parameters() if not name.endswith(tables)]
        parameters = sum(p.numel() for p in counted)
        return result | {"parameters": parameters, "peak_bytes": self._peak_bytes()}

    def _peak_bytes(self) -> int:
        """Return the peak memory of the device, or on a CPU of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    serve(lambda: TorchWorker(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())).commands())
