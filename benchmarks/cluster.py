"""A simple model of a cluster: how long computing and collectives would take. Nothing is measured.

Data goes around rings that enter a node once, as many rings as the group has devices in a node. An
all-reduce goes around twice, but waits for the hops of a tree only, as NCCL's do.
"""

import argparse
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.hlo import Collective

PEAKS = {"f32": 494e12, "bf16": 989e12}  # FLOP/s of an H100: TF32 and bf16


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices; the defaults are round numbers for nodes of 8 H100.

    peak_flops: FLOP/s of a device; mfu: the share of it that a step reaches with useful FLOPs while
    nothing is sent; node_devices: devices of a node; node_bandwidth, network_bandwidth: bytes/s
    that a device sends within its node, and to others; node_latency, network_latency: seconds per
    hop.
    """

    peak_flops: float
    mfu: float = 0.4
    node_devices: int = 8
    node_bandwidth: float = 350e9
    network_bandwidth: float = 45e9
    node_latency: float = 1e-6
    network_latency: float = 5e-6


def predict(useful_flops: float, found: Collection[Collective], cluster: Cluster) -> dict[str, Any]:
    """Seconds of a step, and the share of them that is computing, if nothing is sent meanwhile.

    The same "overlapped" is if as much as possible is sent meanwhile: a real step lies between.

    Args:
      useful_flops: of one device in a step.
    """
    computing = useful_flops / (cluster.peak_flops * cluster.mfu)
    sending = sum(each.times * collective_seconds(each, cluster) for each in found)
    apart, together = computing + sending, max(computing, sending)
    return {
        "computing_seconds": computing,
        "sending_seconds": sending,
        "step_seconds": apart,
        "efficiency": computing / apart,
        "step_seconds_overlapped": together,
        "efficiency_overlapped": computing / together,
        "assumptions": asdict(cluster),
    }


def collective_seconds(each: Collective, cluster: Cluster) -> float:
    """Seconds of one run of a collective, on devices that widen nothing."""
    size = each.groups.shape[1]
    nodes = max(len(np.unique(group // cluster.node_devices)) for group in each.groups)
    members = size / nodes  # devices of the group in a node
    bandwidth, near, far = cluster.node_bandwidth, cluster.node_latency, 0.0
    if nodes > 1:
        bandwidth = min(bandwidth, members * cluster.network_bandwidth)
        far = cluster.network_latency
    if each.kind == "all-reduce":
        turns = 2 * (size - 1) / size
        waiting = 2 * (math.log2(members) * near + math.log2(nodes) * far)
    elif each.kind in ("all-gather", "reduce-scatter"):
        turns = (size - 1) / size
        waiting = nodes * ((members - 1) * near + far)
    else:
        turns, waiting = 1.0, far or near
    return turns * each.sent / bandwidth + waiting


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the fields of a cluster."""
    group = parser.add_argument_group("assumptions of the predicted times")

    def flag(name: str, kind: type, meaning: str) -> None:
        default = getattr(Cluster, name)
        meaning = f"{meaning} (default {default:g})"
        group.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=meaning)

    group.add_argument(
        "--peak-flops",
        type=float,
        help="FLOP/s of a device (default 494e12 in f32, 989e12 in bf16)",
    )
    flag("mfu", float, "share of the peak reached while nothing is sent")
    flag("node_devices", int, "devices of a node")
    flag("node_bandwidth", float, "bytes/s that a device sends within its node")
    flag("network_bandwidth", float, "bytes/s that a device sends to other nodes")
    flag("node_latency", float, "seconds per hop within a node")
    flag("network_latency", float, "seconds per hop between nodes")


def from_flags(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the flags describe."""
    values = {name: getattr(arguments, name) for name in Cluster.__dataclass_fields__}
    return Cluster(**values | {"peak_flops": values["peak_flops"] or PEAKS[arguments.dtype]})
