"""The collectives of a compiled XLA program, read from its text (`compiled.as_text()`).

The text has every instruction once, also those of a loop over 32 blocks; here each counts as often
as it runs. Branches of a conditional count as if all of them ran.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"^\s+(?:ROOT )?\S+ = (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_DEVICES = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Shape:
    """Type and dimensions of an array, as in "bf16[32,65,1280]"."""

    dtype: str
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def bytes(self) -> int:
        """Bytes of the array; less than one per value where the type has fewer than 8 bits."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    def has_rows(self, batch: int, tokens: Collection[int]) -> bool:
        """Whether it holds so many tokens of every image of a batch: the product is a dimension, or
        both are of an array of three and more.
        """
        apart = len(self.dims) > 2 and batch in self.dims
        return any(batch * count in self.dims or (apart and count in self.dims) for count in tokens)


@dataclass(frozen=True)
class Collective:
    """One collective instruction.

    shapes: the arrays that each device gets; groups: device numbers [groups, members], or pairs of
    sender and receiver of a collective-permute; times: how often it runs in one run of the program;
    widened: whether what it sends has just been made from bfloat16, which the CPU's compiler does
    and an accelerator's need not.
    """

    kind: str
    shapes: tuple[Shape, ...]
    groups: np.ndarray
    times: int
    widened: bool = False

    @property
    def payload(self) -> int:
        """Bytes of one run: of the arrays that a device gets, or that a reduce-scatter takes."""
        given = sum(shape.bytes for shape in self.shapes)
        return given * self.groups.shape[1] if self.kind == "reduce-scatter" else given

    @property
    def sent(self) -> int:
        """The same where nothing is widened."""
        return self.payload // 2 if self.widened else self.payload


def collectives(text: str) -> list[Collective]:
    """All collectives of a program.

    Raises:
      ValueError: one lies in a loop of unknown length, or its groups are written in an unknown way.
    """
    found = _DEVICES.search(text)
    devices = int(found.group(1)) if found else 1
    widened = _widened(text)
    read = (_collective(line, times, devices, widened) for line, times in as_run(text))
    return [collective for collective in read if collective]


def total_bytes(found: Collection[Collective], kind: str) -> int:
    """Bytes of all runs of the collectives of a kind, per device."""
    return sum(each.sent * each.times for each in found if each.kind == kind)


def types_of(text: str) -> dict[str, str]:
    """The type of what every instruction gives, by its name; of a tuple the first one's."""
    found = (INSTRUCTION.search(line) for line in text.splitlines())
    shaped = {each.group(1): _SHAPE.search(each.group(2)) for each in found if each}
    return {name: shape.group(1) for name, shape in shaped.items() if shape}


def _widened(text: str) -> set[str]:
    """Names of the instructions that convert from bfloat16, or are fusions that do so."""
    types = types_of(text)
    computations, _ = _computations(text)

    def converts(line: str) -> bool:
        found = re.search(r" convert\(%([\w.-]+)\)", line)
        return bool(found) and types[found.group(1)] == "bf16"

    names = set()
    for line in text.splitlines():
        instruction = INSTRUCTION.search(line)
        called = _called(line) if instruction and instruction.group(3) == "fusion" else []
        inside = (each for name in called for each in computations[name])
        if instruction and (converts(line) or any(converts(each) for each in inside)):
            names.add(instruction.group(1))
    return names


def as_run(text: str) -> Iterator[tuple[str, int | None]]:
    """Every line of a program with how often it runs: None in a loop of unknown length."""
    computations, entry = _computations(text)

    def walk(name: str, times: int | None) -> Iterator[tuple[str, int | None]]:
        for line in computations[name]:
            yield line, times
            trips = _trips(line)
            for called in _called(line):
                yield from walk(called, None if None in (times, trips) else times * trips)

    return walk(entry, 1)


def known(times: int | None, line: str) -> int:
    if times is None:
        raise ValueError(f"in a loop of unknown length: {line.strip()[:200]}")
    return times


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith(" "):
            lines.append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _trips(line: str) -> int | None:
    """How often a line runs what it calls; None where it is a loop that does not tell."""
    if " while(" not in line:
        return 1
    found = _TRIPS.search(line)
    return int(found.group(1)) if found else None


def _called(line: str) -> list[str]:
    return [name for names in _CALLED.findall(line) for name in re.findall(r"[\w.-]+", names)]


def _collective(
    line: str, times: int | None, devices: int, widened: Collection[str]
) -> Collective | None:
    found = _COLLECTIVE.search(line)
    if not found:
        return None
    kind = found.group(2)
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(found.group(1))
    )
    if found.group(3) and kind != "all-reduce":
        # What an asynchronous one gives has its operands first, and maybe two numbers of the
        # backend's own last.
        shapes = tuple(shape for shape in shapes if str(shape) != "u32[]")
        shapes = shapes[len(shapes) // 2 :]
    taken = re.match(r"%([\w.-]+)", line[found.end() :])
    made = bool(taken) and taken.group(1) in widened
    return Collective(kind, shapes, _groups(line, devices), known(times, line), made)


def _groups(line: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members], of any of the ways in which XLA writes them."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}", line)
    if listed:
        rows = [row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return np.array(rows, int) if rows else np.arange(devices)[None]
    iota = re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(T\([\d,]+\))?", line)
    if iota:
        shape, source, order = iota.groups()
        return _iota(source, order).reshape(_numbers(shape))
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\]\S*)\))? \{(.*?)\}", line
    )
    if mesh and ":" not in mesh.group(3):
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"unknown replica groups: {line.strip()[:400]}")


def _mesh_groups(axes: str, device_ids: str | None, along: str) -> np.ndarray:
    """Groups along some of the axes of a mesh, as in `mesh['x'=8,'y'=2] {'x'}`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    if device_ids:
        source, order = device_ids.split("T") if "T" in device_ids else (device_ids, "")
        devices = _iota(source, order)
    else:
        devices = np.arange(math.prod(sizes.values()))
    names, chosen = list(sizes), re.findall(r"'([^']+)'", along)
    last = [names.index(name) for name in chosen]
    first = [axis for axis in range(len(names)) if axis not in last]
    mesh = devices.reshape(list(sizes.values())).transpose(first + last)
    return mesh.reshape(-1, math.prod(sizes[name] for name in chosen))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Numbers from 0 on in a shape "[8,2]", its axes reordered as by "T(1,0)"."""
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
