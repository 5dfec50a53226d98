"""Counts of instructions, matrix products and collectives in a compiled XLA program.

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
_DTYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}  # others end in their bits
LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:matmul|gemm|conv)', re.IGNORECASE)


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
    def bytes(self) -> int:
        """Bytes of its outputs."""
        return sum(array_bytes(dtype, dims) for dtype, dims in self.shapes)

    @property
    def runs(self) -> int:
        if self.times is None:
            raise ValueError(f"in a loop of unknown length: {self.line.strip()[:200]}")
        return self.times


def array_bytes(dtype: str, dims: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    bits = re.findall(r"\d+", dtype)
    size = _DTYPE_BYTES.get(dtype, int(bits[0]) // 8 if bits else 4)
    return size * math.prod(dims)


def parse(line: str, times: int | None = 1) -> Instruction | None:
    """Return the instruction of a line, None if it has none."""
    match = _INSTRUCTION.search(line)
    if not match:
        return None
    name, output, kind, operands = match.groups()
    shapes = tuple(
        (dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(output)
    )
    return Instruction(name, shapes, kind, tuple(re.findall(r"%([\w.-]+)", operands)), line, times)


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
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


def called_by(line: str) -> list[str]:
    """Return the names of the computations that an instruction calls."""
    return [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.-]+", names)]


def trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """Return how often a loop runs, None if that is unknown.

    The TPU compiler leaves no count: there a counter starts at 0, is below a bound, and grows by a
    constant.
    """
    if known := _TRIP_COUNT.search(line):
        return int(known.group(1))
    called = dict(re.findall(r"\b(condition|body)=%?([\w.-]+)", line))
    condition = _Definitions(computations[called["condition"]])
    body = _Definitions(computations[called["body"]])
    if not (condition.root and body.root and body.root.kind == "tuple"):
        return None
    end = condition.root
    if end.kind != "compare" or "direction=LT" not in end.line or len(end.operands) != 2:
        return None
    index = condition.tuple_index(end.operands[0])
    bound = condition.constant(end.operands[1])
    if index is None or bound is None:
        return None
    update = body.find(body.root.operands[index])
    if update is None or update.kind != "add":
        return None
    steps = [step for name in update.operands if (step := body.constant(name))]
    counters = [name for name in update.operands if body.tuple_index(name) == index]
    return math.ceil(bound / steps[0]) if len(steps) == len(counters) == 1 else None


class _Definitions:
    """The instructions of a computation, found by name through copies."""

    def __init__(self, lines: list[str]):
        parsed = [each for line in lines if (each := parse(line))]
        self._by_name = {each.name: each for each in parsed}
        roots = [each for each in parsed if each.line.lstrip().startswith("ROOT ")]
        self.root = roots[0] if roots else None

    def find(self, name: str) -> Instruction | None:
        each = self._by_name.get(name)
        return self.find(each.operands[0]) if each and each.kind == "copy" else each

    def constant(self, name: str) -> int | None:
        """Return the value of an integer constant."""
        return self._number(name, r" [su]32\[\]\S* constant\((\d+)\)")

    def tuple_index(self, name: str) -> int | None:
        """Return which element of the loop's state it is."""
        return self._number(name, r" get-tuple-element\(.*\bindex=(\d+)")

    def _number(self, name: str, pattern: str) -> int | None:
        each = self.find(name)
        match = re.search(pattern, each.line) if each else None
        return int(match.group(1)) if match else None


def instructions(text: str) -> Iterator[Instruction]:
    """Yield the instructions of a program, those of loops, fusions and all branches included."""
    computations, entry = computations_of(text)

    def walk(name: str, times: int | None) -> Iterator[Instruction]:
        for line in computations[name]:
            if parsed := parse(line, times):
                yield parsed
            trips: int | None = 1
            if " while(" in line:
                trips = trip_count(line, computations)
            for called in called_by(line):
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
        or (each.kind == "custom-call" and LIBRARY_PRODUCT.search(each.line))
    ]


def _dtypes(text: str) -> dict[str, str]:
    """Return the dtype of every instruction's (first) output by its name."""
    parsed = [each for line in text.splitlines() if (each := parse(line)) and each.shapes]
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
    computations, _ = computations_of(text)

    def converts(line: str) -> bool:
        match = re.search(r" convert\(%([\w.-]+)\)", line)
        return bool(match) and dtypes[match.group(1)] == "bf16"

    names = set()
    for line in text.splitlines():
        each = parse(line)
        called = called_by(line) if each and each.kind == "fusion" else []
        body = [inner for name in called for inner in computations[name]]
        if each and any(map(converts, [line, *body])):
            names.add(each.name)
    return names
