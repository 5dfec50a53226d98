"""The worker of a PyTorch peer: the same work on the same weights, images and masks.

    python -m benchmarks.workers.peers {hf,timm,official}[_compile] PLAN.json

`benchmarks.step` starts it and writes the plan; the worker of mae_jax writes weights and images.
Peers are at their best: fused attention and a fused AdamW, gradients set to None, nothing fetched
from the device in a step, and in bfloat16 autocast for training, bfloat16 weights for encoding.
"""

import itertools
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import versions
from benchmarks.workers.protocol import UnusableError, burst, serve

try:
    import torch
    from safetensors.torch import save_file

    from benchmarks.workers import peer_models
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None

PACKAGES = ("torch", "transformers", "timm", "torchvision", "numpy", "triton", "safetensors")
Plan = dict[str, Any]


def on_device(images: np.ndarray, plan: Plan, device: Any, dtype: Any) -> list[Any]:
    """uint8 batches [b, h, w, c] as normalised [b, c, h, w] on the device."""
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
        self._turns, self._device = itertools.cycle(images), images[0].device
        self._patches = plan["patches"]
        trained = [p for p in model.parameters() if p.requires_grad]
        # As in the official recipe: biases and norms are not decayed.
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": plan["weight_decay"]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._trained, betas = trained, (plan["b1"], plan["b2"])
        self._optimizer = torch.optim.AdamW(
            groups, lr=plan["first_rate"], betas=betas, eps=plan["eps"], fused=True
        )
        self._loss: Any = None

    def run(self) -> None:
        images = next(self._turns)
        self._gradients(images, torch.rand(len(images), self._patches, device=self._device))
        self._update()

    def _gradients(self, images: Any, noise: Any) -> None:
        half = self._plan["dtype"] == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            loss = self._compiled(images, noise)
        loss.backward()
        self._loss = loss.detach()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        synchronise(self._device)

    def loss(self) -> float:
        """Of the last step."""
        return self._loss.item()

    def check(self, folder: Path, name: str) -> dict[str, float]:
        """As in the worker of mae_jax, on the masks that it drew."""
        noise = [torch.from_numpy(x).to(self._device) for x in np.load(folder / "noise.npy")]
        first = First(self, lambda: self._gradients(next(self._turns), noise[0]))
        seconds, found = burst(first, 1)["wall"], {"loss": self.loss()}
        found["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in self._trained]).item()
        seconds += burst(First(self, self._update), 1)["wall"]
        tensors = {
            key: x.detach().cpu().contiguous() for key, x in self._model.state_dict().items()
        }
        save_file(tensors, folder / f"{name}.safetensors")
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan["rate"]
        reset_peak(self._device)
        self._gradients(next(self._turns), noise[1])
        self._update()
        return found | {"first_s": seconds, "next_loss": self.loss()}


class First:
    """One part of a job as a job of its own, to be timed."""

    def __init__(self, job: Any, run: Callable[[], None]):
        self.run, self.wait = run, job.wait


class Encoding:
    """The encoder: a model of whole images -> tokens after its last norm."""

    def __init__(self, model: Any, compiled: Any, images: list[Any], plan: Plan):
        self._compiled, self._turns = compiled, itertools.cycle(images)
        self._device, self._tokens = images[0].device, None

    def run(self) -> None:
        with torch.inference_mode():
            self._tokens = self._compiled(next(self._turns))

    def wait(self) -> None:
        synchronise(self._device)

    def check(self, folder: Path, name: str) -> dict[str, float]:
        """As in the worker of mae_jax."""
        seconds = burst(self, 1)["wall"]
        np.save(folder / f"{name}.npy", self._tokens.float().cpu().numpy())
        reset_peak(self._device)
        self.run()
        return {"first_s": seconds}

    def loss(self) -> float:
        """Not a loss, but as finite as the tokens are."""
        return self._tokens.float().square().mean().item()


def synchronise(device: Any) -> None:
    """Waits for all that the device was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: Any) -> None:
    """Forgets what memory compiling has taken."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


class Peer:
    """The commands of this worker."""

    def __init__(self, name: str, plan: Plan):
        if MISSING:
            raise UnusableError(f"{MISSING}; name a Python that has it by --python {name}=PATH")
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
            "burst": lambda steps: burst(self._job, steps),
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
        """Loads the weights, and takes the first steps on the masks that are given."""
        plan, train = self._plan, self._plan["task"] == "train"
        dtype = torch.bfloat16 if plan["dtype"] == "bf16" and not train else torch.float32
        model = peer_models.load(self._name, plan).to(self._device, dtype)
        images = on_device(np.load(self._folder / "images.npy"), plan, self._device, dtype)
        compiled = model
        if self._name.endswith("_compile"):
            compiled = torch.compile(model, mode=plan["compile_mode"], dynamic=False)
        self._job = (Training if train else Encoding)(model.train(train), compiled, images, plan)
        found = self._job.check(self._folder, self._name)
        tables = ("pos_embed", "position_embeddings")  # which mae_jax computes
        counted = [p for name, p in model.named_parameters() if not name.endswith(tables)]
        parameters = sum(p.numel() for p in counted)
        return found | {"parameters": parameters, "peak_bytes": self._peak_bytes()}

    def _peak_bytes(self) -> int:
        """Most memory used so far: of the device, or on a CPU of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1], json.loads(Path(sys.argv[2]).read_text())).commands())
