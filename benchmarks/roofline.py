"""A roofline of a compiled program: where the time of its kernels goes, at best.

Each kernel takes the longer of its bytes / bandwidth and its FLOPs / FLOP/s, plus the overhead of a
launch; for TPUs the compiler's own estimate of cycles stands in for the first two. Kernels run one
after another; collectives run beside the kernels between their start and their end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.hlo import COLLECTIVES
from benchmarks.kernels import DONE, START, Kernel, cost_estimate, schedule
from benchmarks.targets import Target

REGISTER = 1024  # values of a float32 vector register of a TPU

# The first pattern that is found in the path of an operation decides.
CATEGORIES = (
    ("optimizer", r"/optimizer/"),
    ("guard", r"/guard/|global_norm"),
    ("masks", r"/sample/|threefry|argsort"),
    ("augmentation", r"/preprocess/|mix_images|random_erasing"),
    ("loss", r"/loss/"),
    # On several devices the fused attention of a GPU is named by its partitioning alone.
    ("attention", r"dot_product_attention|tpu_attention|attn/custom_partitioning"),
    ("copies", r"dynamic_(update_)?(index|slice)|cast_kernels"),  # stacks of a loop over blocks
    ("qkv", r"attn/qkv"),
    ("proj", r"attn/proj"),
    ("softmax", r"attn/.*(exp|reduce_max|max|div|sub)"),
    ("scores", r"/attn/"),
    ("mlp", r"mlp/fc[12]"),
    ("gelu", r"/mlp/"),
    ("norms", r"norm\d?/|fold_norms"),
    ("embedding", r"patch_embed|embed|cls_token|mask_token|take"),
    ("head", r"/head/"),
    ("residuals", r"blocks/"),
)


@dataclass(frozen=True)
class Timed:
    """A kernel with its category, and the seconds that all of its runs take."""

    kernel: Kernel
    category: str
    seconds: float

    @property
    def runs(self) -> int:
        """How often it runs in a step."""
        return self.kernel.instruction.runs


@dataclass(frozen=True)
class Collective:
    """A collective: bytes of complete arrays per run, seconds of all runs.

    exposed: seconds of all runs that no kernel hides.
    """

    kind: str
    dtypes: str
    bytes: int
    runs: int
    seconds: float
    exposed: float


def categorize(kernel: Kernel) -> str:
    """Return the category of a kernel; "copies" or "other" if its path has none."""
    path = re.sub(r"[()]", "/", f"/{kernel.op_name}/")  # also scopes inside jvp(...)
    for category, pattern in CATEGORIES:
        if re.search(pattern, path):
            return category
    return "copies" if "copy" in kernel.instruction.kind or "copy" in kernel.op_name else "other"


def kernel_seconds(kernel: Kernel, target: Target) -> float:
    """Return the seconds of one run."""
    if target.clock_ghz and not target.cores:  # a TPU
        return _tpu_seconds(kernel, target)
    return max(kernel.bytes / target.bandwidth, kernel.flops / target.flops) + target.kernel_s


def _tpu_seconds(kernel: Kernel, target: Target) -> float:
    """Return the seconds that the compiler estimates, or those of a Pallas kernel (attention).

    The latter computes on some blocks while it copies others.
    """
    hertz = target.clock_ghz * 1e9
    if declared := cost_estimate(kernel.instruction):
        registers = declared["transcendentals"] / REGISTER
        cycles = registers * target.attention_cycles["backward" in kernel.op_name]
        return max(kernel.bytes / target.bandwidth, cycles / hertz)
    estimated = re.search(r'"estimated_cycles":"(\d+)"', kernel.instruction.line)
    return int(estimated.group(1)) / hertz if estimated else 0.0


def analyze(text: str, target: Target) -> tuple[list[Timed], list[Collective]]:
    """Return all kernels and all collectives of a program, in the order of its schedule."""
    timed: list[Timed] = []
    collectives: list[Collective] = []
    started: dict[str, tuple[Kernel, float]] = {}  # collectives under way, since when
    clock = 0.0
    for kernel in schedule(text):
        each = kernel.instruction
        if each.kind == DONE:
            start, since = started.pop(each.operands[0])
            collectives.append(_collective(start, target, hidden=clock - since))
        elif each.kind in COLLECTIVES:
            collectives.append(_collective(kernel, target, hidden=0.0))
        elif each.kind.removesuffix(START) in COLLECTIVES:
            started[each.name] = kernel, clock
        else:
            seconds = kernel_seconds(kernel, target)
            clock += seconds
            timed.append(Timed(kernel, categorize(kernel), seconds * each.runs))
    return timed, collectives


def _collective(kernel: Kernel, target: Target, hidden: float) -> Collective:
    """Return a collective, of which kernels hide some seconds; an all-reduce sends twice."""
    each = kernel.instruction
    kind = each.kind.removesuffix(START)
    seconds = kernel.bytes * (2 if kind == "all-reduce" else 1) / target.link_bandwidth
    return Collective(
        kind=kind,
        dtypes="+".join(sorted({dtype for dtype, _ in each.shapes})),
        bytes=kernel.bytes,
        runs=each.runs,
        seconds=seconds * each.runs,
        exposed=max(0.0, seconds - hidden) * each.runs,
    )


def longest(timed: Sequence[Timed], number: int) -> list[dict[str, Any]]:
    """Return the operations that take longest; those of all blocks without a loop are one."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in timed:
        kernel = each.kernel
        first = {
            "seconds": 0.0,
            "runs": 0,
            "bytes": kernel.bytes,
            "flops": kernel.flops,
            "category": each.category,
            "kernel": kernel.instruction.name,
            "op_name": kernel.op_name,
        }
        row = rows.setdefault((kernel.op_name, kernel.bytes, kernel.flops), first)
        row["seconds"] += each.seconds
        row["runs"] += each.runs
    return sorted(rows.values(), key=lambda row: -row["seconds"])[:number]


def by_category(timed: Sequence[Timed]) -> dict[str, dict[str, float]]:
    """Return kernels, bytes, FLOPs and seconds of every category, the longest first."""
    totals: dict[str, dict[str, float]] = {}
    for each in timed:
        row = totals.setdefault(each.category, dict(kernels=0, bytes=0, flops=0, seconds=0))
        row["kernels"] += each.runs
        row["bytes"] += each.kernel.bytes * each.runs
        row["flops"] += each.kernel.flops * each.runs
        row["seconds"] += each.seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]["seconds"]))


def by_kind(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    """Return runs, bytes and seconds of the collectives of every kind and dtype."""
    totals: dict[tuple[str, str], dict[str, Any]] = {}
    for each in collectives:
        first = dict(kind=each.kind, dtypes=each.dtypes, runs=0, bytes=0, seconds=0.0, exposed=0.0)
        row = totals.setdefault((each.kind, each.dtypes), first)
        row["runs"] += each.runs
        row["bytes"] += each.bytes * each.runs
        row["seconds"] += each.seconds
        row["exposed"] += each.exposed
    return sorted(totals.values(), key=lambda row: -row["seconds"])
