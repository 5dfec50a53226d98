"""How arrays are laid out over devices: a mesh, and one rule for the state and one for batches."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_SPEC = PartitionSpec(("data", "fsdp"))
MIN_SPLIT_BYTES = 2**20  # smaller arrays cost more to gather than to copy
MAX_REPLICATED = 0.1  # share of a state that may stay whole where the rest is split


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as data x fsdp; batches split over both axes, the state over `fsdp` only.

    Devices stand in the order of their processes, so that the rows of a batch that a process reads
    are one slice of it; neighbours, whose links are the fastest, share an fsdp group.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if fsdp < 1 or len(devices) % fsdp:
        fitting = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ValueError(
            f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices: use {', '.join(fitting)}"
        )
    # Explicit axes would refuse the reshape of patchify.
    return Mesh(
        np.array(devices).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """ValueError unless the batch splits over accumulation steps and devices."""
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    parts = accumulate * mesh.size
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        use = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"batch_size={batch_size} does not divide by accumulate={accumulate} x {mesh.size} "
            f"devices. Use {use}."
        )


def round_up_batch(batch_size: int, mesh: Mesh) -> int:
    """The next batch size that splits over all devices."""
    return -(-batch_size // mesh.size) * mesh.size


def state_shardings(state: Any, mesh: Mesh, min_bytes: int = MIN_SPLIT_BYTES) -> Any:
    """A sharding for every leaf of a state of arrays or shapes.

    Arrays of `min_bytes` and more are split along their largest axis that the fsdp axis divides,
    never along the depth of stacked blocks, which is scanned over. All else is replicated.
    """

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        if mesh.shape["fsdp"] > 1 and leaf.size * leaf.dtype.itemsize >= min_bytes:
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            axes = range(1 if stacked else 0, leaf.ndim)
            axes = [axis for axis in axes if leaf.shape[axis] % mesh.shape["fsdp"] == 0]
            if axes:
                spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, state)


def bytes_per_device(state: Any, shardings: Any) -> tuple[int, int]:
    """Bytes of a state that each device holds: of arrays that are split, and of whole ones."""
    split = whole = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if sharding.is_fully_replicated:
            whole += size
        else:
            split += size
    return split, whole


def check_split(state: Any, shardings: Any, mesh: Mesh, most_whole: float) -> None:
    """ValueError if under fsdp more than such a share of the state's bytes stays whole."""
    if mesh.shape["fsdp"] == 1:
        return
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    _, whole = bytes_per_device(state, shardings)
    if whole > most_whole * total:
        raise ValueError(
            f"mesh.fsdp={mesh.shape['fsdp']} leaves {100 * whole / total:.0f} % of the parameters "
            f"and optimizer whole on every device ({whole / 1e6:,.1f} of {total / 1e6:,.1f} MB): "
            "their sizes do not divide by it, or lie below mesh.min_split_bytes. Use mesh.fsdp=1, "
            "which is right for small models, or a number that divides more sizes, such as 8; or "
            "lower mesh.min_split_bytes, or raise mesh.max_whole"
        )


def device_put_tree(tree: Any, shardings: Any) -> Any:
    """Numpy arrays that every process has as a whole on their devices, beside those there are."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array):
            return x
        return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])

    return jax.tree.map(place, tree, shardings)


def gather_to_host(tree: Any) -> Any:
    """As numpy, on every process: global arrays as a whole, and the rows of all processes."""
    return multihost_utils.process_allgather(tree, tiled=True)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as part of the global arrays."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def batch_constraint(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Pins an activation to its batch axis; without it XLA may gather whole batches under fsdp."""

    def constrain(x: jax.Array) -> jax.Array:
        if mesh.size == 1 or x.shape[0] % mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH_SPEC))

    return constrain
