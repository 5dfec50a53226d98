"""Accelerators to compile for without one: their compilers run on any machine.

NVIDIA GPUs take the CUDA plugin of jax, TPUs libtpu; `pip install '.[compile]'` has both.
"""

import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from mae_jax.models.flops import peak_flops
from mae_jax.utils.errors import UserError


@dataclass(frozen=True)
class Target:
    """A device, with the speeds of the roofline (per second) and the overhead of a kernel.

    memory: bytes of device memory; bandwidth: bytes that kernels reach, 83 % of the data sheet;
    flops: bfloat16 FLOPs that large matrix products reach, two thirds of it; link_bandwidth: bytes
    that collectives reach per device within a host, on TPUs both ways around a ring; kernel_s:
    seconds to launch a kernel; attention_cycles: of a TPU's fused attention per vector register
    of scores, forward and backward: instruction bundles in the kernel that libtpu compiles (it
    estimates no cycles).
    """

    device_kind: str
    memory: float
    bandwidth: float
    flops: float
    link_bandwidth: float
    kernel_s: float = 3e-6
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    shared_memory: int = 0  # bytes per multiprocessor
    l2_cache: int = 0  # bytes
    clock_ghz: float = 0.0
    attention_cycles: tuple[float, float] = (0.0, 0.0)

    @property
    def peak(self) -> float:
        """Peak bfloat16 FLOP/s of the data sheet."""
        return peak_flops(self.device_kind) or self.flops


def _hopper(kind: str, memory: float, bandwidth: float) -> Target:
    return Target(kind, memory, bandwidth, 650e12, 350e9, 3e-6, (9, 0), 132, 233472, 52428800, 1.98)


GPUS = {
    "a100": Target(
        *("NVIDIA A100-SXM4-80GB", 80e9, 1.7e12, 205e12, 230e9, 3e-6),
        *((8, 0), 108, 167936, 41943040, 1.41),
    ),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 80e9, 2.8e12),
    "h200": _hopper("NVIDIA H200", 141e9, 4.0e12),
    "b200": Target(
        *("NVIDIA B200", 180e9, 6.6e12, 1500e12, 700e9, 3e-6),
        *((10, 0), 148, 233472, 132644864, 1.96),
    ),
}
# The clock turns the cycles that the TPU compiler estimates into seconds.
TPUS = {
    "v5e": Target(
        "TPU v5 lite", 16e9, 0.68e12, 131e12, 90e9, clock_ghz=1.5, attention_cycles=(12.4, 22.1)
    ),
    # Its attention is taken to be as fast as that of a v5e, per cycle.
    "v5p": Target(
        "TPU v5", 95e9, 2.3e12, 306e12, 180e9, clock_ghz=1.75, attention_cycles=(12.4, 22.1)
    ),
    "v6e": Target(
        "TPU v6 lite", 32e9, 1.36e12, 612e12, 180e9, clock_ghz=1.75, attention_cycles=(9.5, 18.1)
    ),
}
_TPU_ACCELERATORS = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
NAMES = (*GPUS, *(f"{name}:2x2" for name in ("v5e", "v6e")), "v5p:2x2x1")

_GPU_DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: {t.capability[0]} minor: {t.capability[1]} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {t.shared_memory}
  threads_per_core_limit: 2048
  core_count: {t.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {t.bandwidth:.0f}
  l2_cache_size: {t.l2_cache}
  clock_rate_ghz: {t.clock_ghz}
  device_memory_size: {t.memory:.0f}
  shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{t.device_kind}"
"""


def get_target(name: str) -> Target:
    """Return a target, as "h200" or "v5e:2x2".

    Raises:
      UserError: it is unknown.
    """
    family = name.split(":")[0]
    if family in GPUS and ":" not in name:
        return GPUS[family]
    if family in TPUS and ":" in name:
        return TPUS[family]
    problem = f"must be one of {', '.join(NAMES)}, or a TPU with another topology (v5e:4x4)"
    raise UserError(problem, key="--target", value=name)


@contextmanager
def compile_for(name: str, num_devices: int = 1) -> Iterator[list[Any]]:
    """Yield the devices of a target; what is traced meanwhile takes the branches of its backend.

    Call it before jax is used for anything else in this process.

    Args:
      num_devices: GPUs, in hosts of 8; the topology of TPUs determines it.

    Raises:
      UserError: the target is unknown, or its compiler is not installed.
    """
    target, family = get_target(name), name.split(":")[0]
    backend = "gpu" if family in GPUS else "tpu"
    _check_installed(backend)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # only clients can read its entries
    jax.devices()  # so that the CPU is what runs here
    devices = _gpus(target, num_devices) if backend == "gpu" else _tpus(name, num_devices)
    with (
        mock.patch.object(jax, "default_backend", return_value=backend),
        mock.patch.object(jax, "device_count", return_value=len(devices)),
        _cudnn_checks_pass(),
    ):
        yield devices


def _check_installed(backend: str) -> None:
    modules = {"gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}[backend]
    if not any(map(importlib.util.find_spec, modules)):
        raise UserError(
            f"the compiler for {backend.upper()}s is not installed: pip install '.[compile]'"
        )


def _gpus(target: Target, num_devices: int) -> list[Any]:
    from jax._src import xla_bridge

    # Kernels are not timed, which would need a device.
    if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
        raise RuntimeError("set XLA_FLAGS=--xla_gpu_autotune_level=0 before importing jax")
    per_host = min(num_devices, 8)
    if num_devices % per_host:
        raise UserError("must be at most 8, or a multiple of 8", key="--devices", value=num_devices)
    optin = target.shared_memory - 1024
    text = _GPU_DESCRIPTION.format(t=target, optin=optin)
    canonicalize = xla_bridge.canonicalize_platform
    gpu_is_cuda = lambda name: "cuda" if name in ("gpu", "cuda") else canonicalize(name)
    xla_bridge.canonicalize_platform = gpu_is_cuda  # it would look for a CUDA client
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x{num_devices // per_host}x{per_host}"
    )
    return list(topology.devices)


def _tpus(name: str, num_devices: int) -> list[Any]:
    family, shape = name.split(":")
    axes = 3 if family == "v5p" else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        example = f"{family}:{'x'.join('2' * axes)}"
        raise UserError(f"must have {axes} axes, as {example}", key="--target", value=name)
    chips = math.prod(map(int, shape.split("x")))
    if num_devices not in (1, chips):
        problem = f"does not fit {name}, which has {chips} devices: leave it out"
        raise UserError(problem, key="--devices", value=num_devices)
    cores = 2 * chips if family == "v5p" else chips
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{_TPU_ACCELERATORS[family]}-{cores}")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" not in str(error):
            raise
        raise UserError(
            "another process uses libtpu, which only one can at a time: wait for it"
        ) from error
    return list(topology.devices)


@contextmanager
def _cudnn_checks_pass() -> Iterator[None]:
    """Let jax lower cuDNN's attention without the library and device that it would look at."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    with mock.patch.object(cudnn, "check_cudnn_version", return_value=91000):
        yield
