"""How arrays are laid out over devices: a mesh, and one rule for the state and one for batches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))
MIN_SHARDED_BYTES = 2**20  # smaller arrays cost more to gather than to copy


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as data x fsdp; batches split over both axes, the state over `fsdp` only."""
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise ValueError(f"mesh.fsdp={fsdp} does not divide the {devices} devices")
    # make_mesh's default of Explicit axes would refuse the reshape of patchify.
    return jax.make_mesh(
        (devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, hosts: int = 1) -> None:
    """ValueError unless the batch splits over accumulation steps, devices and hosts."""
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1")
    parts = int(np.lcm(accumulate * mesh.size, hosts))
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        use = f"{below} or {above}" if below > 0 else f"{above}"
        raise ValueError(
            f"batch_size={batch_size} does not divide by accumulate={accumulate} x {mesh.size} "
            f"devices. Use {use}."
        )


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next batch size that splits over all devices."""
    return -(-batch_size // mesh.size) * mesh.size


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a state of arrays or shapes.

    Large arrays are split along their largest axis that the fsdp axis divides, never along the
    depth of stacked blocks, which is scanned over. All else is replicated.
    """

    def rule(path: tuple, leaf: Any) -> NamedSharding:
        spec: list[str | None] = [None] * leaf.ndim
        if mesh.shape["fsdp"] > 1 and leaf.size * leaf.dtype.itemsize >= MIN_SHARDED_BYTES:
            stacked = any(getattr(key, "key", None) == "blocks" for key in path)
            axes = range(1 if stacked else 0, leaf.ndim)
            axes = [axis for axis in axes if leaf.shape[axis] % mesh.shape["fsdp"] == 0]
            if axes:
                spec[max(axes, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, state)


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch as part of the global arrays."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def batch_constraint(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Pins an activation to its batch axis; without it XLA may gather whole batches under fsdp."""

    def constrain(x: jax.Array) -> jax.Array:
        if mesh.size == 1 or x.shape[0] % mesh.size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, BATCH))

    return constrain
