"""Sharding over devices: the mesh, and one rule for train states and one for batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mae_jax.utils.errors import UserError

BATCH_SPEC = PartitionSpec(("data", "fsdp"))
MIN_SPLIT_BYTES = 2**20  # smaller arrays cost more to gather than to copy
MAX_REPLICATED = 0.1  # largest fraction of the bytes of a state that FSDP may leave replicated


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of all devices, data x fsdp.

    Batches are sharded over both axes, train states over `fsdp` only. Devices are in the order of
    their processes: the rows of a batch that a process reads are contiguous, and neighbors, which
    have the fastest links, share an fsdp group.

    Raises:
      UserError: `fsdp` does not divide the number of devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or len(devices) % fsdp:
        divisors = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"does not divide the {len(devices)} devices: use {', '.join(divisors)}",
            key="mesh.fsdp",
            value=fsdp,
        )
    # Explicit axes do not support the reshape of patchify.
    return Mesh(
        np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )


def check_batch(batch_size: int, grad_accum_steps: int, mesh: Mesh) -> None:
    """Raise UserError unless a batch divides into micro-batches on all devices."""
    for key, value in (("batch_size", batch_size), ("accumulate", grad_accum_steps)):
        if value < 1:
            raise UserError("must be at least 1", key=key, value=value)
    shards = grad_accum_steps * mesh.size
    if batch_size % shards:
        below, above = batch_size // shards * shards, (batch_size // shards + 1) * shards
        remedy = f"{below} or {above}" if below > 0 else f"{above}"
        raise UserError(
            f"is not divisible by accumulate={grad_accum_steps} x {mesh.size} devices: use "
            f"{remedy}",
            key="batch_size",
            value=batch_size,
        )


def round_up_batch(batch_size: int, mesh: Mesh) -> int:
    """Return the next batch size that is divisible by the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def state_shardings(state: Any, mesh: Mesh, min_bytes: int = MIN_SPLIT_BYTES) -> Any:
    """Return a sharding for every leaf of a state of arrays or shapes (FSDP).

    Arrays of `min_bytes` and more are sharded along their largest axis that is divisible by the
    fsdp axis, but never along the depth of stacked blocks, which is scanned. All other arrays are
    replicated. The columns of qkv count as a third: the model splits them into three parts, whose
    shards would have to move between devices.
    """

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        if mesh.shape["fsdp"] > 1 and leaf.size * leaf.dtype.itemsize >= min_bytes:
            names = {getattr(key, "key", None) for key in path}
            sizes = list(leaf.shape)
            if "qkv" in names:
                sizes[-1] //= 3
            axes = range(1 if "blocks" in names else 0, leaf.ndim)
            axes = [axis for axis in axes if sizes[axis] % mesh.shape["fsdp"] == 0]
            if axes:
                spec[max(axes, key=lambda axis: sizes[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, state)


def bytes_per_device(state: Any, shardings: Any) -> tuple[int, int]:
    """Return the bytes of a state on each device, of sharded and of replicated arrays."""
    sharded = replicated = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if sharding.is_fully_replicated:
            replicated += size
        else:
            sharded += size
    return sharded, replicated


def check_sharded(state: Any, shardings: Any, mesh: Mesh, max_replicated: float) -> None:
    """Raise UserError if FSDP leaves more than a fraction of a state's bytes replicated."""
    fsdp = mesh.shape["fsdp"]
    if fsdp == 1:
        return
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    _, replicated = bytes_per_device(state, shardings)
    if replicated > max_replicated * total:
        raise UserError(
            f"leaves {100 * replicated / total:.0f} % of the parameters and optimizer state "
            f"replicated on every device ({replicated / 1e6:,.1f} of {total / 1e6:,.1f} MB): their "
            "sizes are not divisible by it, or below mesh.min_split_bytes. Use mesh.fsdp=1, which "
            "suits small models, or a divisor of more sizes, such as 8; or lower "
            "mesh.min_split_bytes, or raise mesh.max_whole",
            key="mesh.fsdp",
            value=fsdp,
        )


def device_put_tree(tree: Any, shardings: Any) -> Any:
    """Put numpy arrays, of which every process has all, on their devices; keep jax arrays."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def gather_to_host(tree: Any) -> Any:
    """Return global arrays, and the concatenated local rows of all processes, as numpy arrays."""
    return multihost_utils.process_allgather(tree, tiled=True)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays from the rows of a batch that this process has read."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def batch_constraint(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Return a function that constrains an activation to be sharded along its batch axis.

    Without the constraint XLA may gather complete batches under FSDP.
    """

    def constrain(x: jax.Array) -> jax.Array:
        if mesh.size == 1 or x.shape[0] % mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH_SPEC))

    return constrain
