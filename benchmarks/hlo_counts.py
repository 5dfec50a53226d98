"""Counts of instructions, matrix products and collectives in the text of a compiled XLA program.

The text (`compiled.as_text()`) has every instruction once, also those of a loop over blocks. Here
each counts as often as it runs; all branches of a conditional count.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COUNTED = ("transpose", "copy", "gather", "scatter", "sort", "convert", "while")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:matmul|gemm|conv)', re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """An instruction; times: how often it runs in one run of the program, None if unknown."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dimensions of its outputs
    kind: str
    operands: tuple[str, ...]
    line: str
    times: int | None

    @property
    def runs(self) -> int:
        if self.times is None:
            raise ValueError(f"in a loop of unknown length: {self.line.strip()[:200]}")
        return self.times


def _parse(line: str, times: int | None = 1) -> Instruction | None:
    match = _INSTRUCTION.search(line)
    if not match:
        return None
    name, output, kind, operands = match.groups()
    shapes = tuple(
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(output)
    )
    return Instruction(name, shapes, kind, tuple(re.findall(r"%([\w.-]+)", operands)), line, times)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith(" "):
            lines.append(line)
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _called(line: str) -> list[str]:
    return [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.-]+", names)]


def instructions(text: str) -> Iterator[Instruction]:
    """Yield the instructions of a program, those of loops, fusions and all branches included."""
    computations, entry = _computations(text)

    def walk(name: str, times: int | None) -> Iterator[Instruction]:
        for line in computations[name]:
            if parsed := _parse(line, times):
                yield parsed
            trips: int | None = 1
            if " while(" in line:
                known = _TRIP_COUNT.search(line)
                trips = int(known.group(1)) if known else None
            for called in _called(line):
                yield from walk(called, None if times is None or trips is None else times * trips)

    return walk(entry, 1)


def count_kinds(text: str) -> dict[str, int]:
    """Return how often the instructions of each COUNTED kind run.

    Raises:
      ValueError: one is in a loop of unknown length.
    """
    counts = dict.fromkeys(COUNTED, 0)
    for each in instructions(text):
        if each.kind in counts:
            counts[each.kind] += each.runs
    return counts


def products(text: str) -> list[tuple[tuple[str, ...], int]]:
    """Return operand dtypes and number of runs of all matrix products and convolutions."""
    dtypes = _dtypes(text)
    return [
        (tuple(dtypes[operand] for operand in each.operands[:2]), each.runs)
        for each in instructions(text)
        if each.kind in ("dot", "convolution")
        or (each.kind == "custom-call" and _LIBRARY_PRODUCT.search(each.line))
    ]


def _dtypes(text: str) -> dict[str, str]:
    """Return the dtype of every instruction's (first) output by its name."""
    parsed = [each for line in text.splitlines() if (each := _parse(line)) and each.shapes]
    return {each.name: each.shapes[0][0] for each in parsed}


@dataclass(frozen=True)
class Collective:
    """A collective: sizes of its output arrays, bytes per run, and number of runs."""

    kind: str
    sizes: tuple[int, ...]
    bytes: int
    runs: int


def collectives(text: str) -> list[Collective]:
    """Return all collectives of a program.

    What the CPU compiler converts from bfloat16 right before sending counts as bfloat16.
    """
    widened, result = _widened(text), []
    for each in instructions(text):
        kind = each.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = tuple(math.prod(dims) for _, dims in each.shapes)
            bits = [int((re.findall(r"\d+", dtype) or ["8"])[0]) for dtype, _ in each.shapes]
            total = sum(size * width for size, width in zip(sizes, bits)) // 8
            halved = bool(each.operands) and each.operands[0] in widened
            result.append(Collective(kind, sizes, total // 2 if halved else total, each.runs))
    return result


def _widened(text: str) -> set[str]:
    """Return the instructions that convert from bfloat16, or are fusions that do."""
    dtypes = _dtypes(text)
    computations, _ = _computations(text)

    def converts(line: str) -> bool:
        match = re.search(r" convert\(%([\w.-]+)\)", line)
        return bool(match) and dtypes[match.group(1)] == "bf16"

    names = set()
    for line in text.splitlines():
        each = _parse(line)
        called = _called(line) if each and each.kind == "fusion" else []
        body = [inner for name in called for inner in computations[name]]
        if each and any(map(converts, [line, *body])):
            names.add(each.name)
    return names
