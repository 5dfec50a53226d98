"""Counts of instructions, kernels, matrix products and collectives in a compiled XLA program.

The text (`compiled.as_text()`) has every instruction once, also those of a loop over blocks. Here
each counts as often as it runs; all branches of a conditional count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COUNTED = ("transpose", "copy", "gather", "scatter", "sort", "convert", "while")
START, DONE = "-start", "done"  # of an asynchronous collective
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
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "async-update"}
_VIEWS = ("slice", "dynamic-slice", "gather")  # they read no more than they return
_ENTERED = ("while", "conditional", "call", "async-start")  # run the kernels of a computation
_PALLAS = 'custom_call_target="tpu_custom_call"'
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
    def bytes(self) -> int:
        """Bytes of its outputs in device memory (on TPUs, S(1) marks the vector memory)."""
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


def _trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """Return how often a loop runs, None if that is unknown.

    The TPU compiler leaves no count: there it is the bound of the counter, which starts at 0.
    """
    if known := _TRIP_COUNT.search(line):
        return int(known.group(1))
    condition = re.search(r"\bcondition=%?([\w.-]+)", line)
    body = "\n".join(computations.get(condition.group(1), [])) if condition else ""
    bound = re.search(r"ROOT [^\n]* compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", body)
    if not bound:
        return None
    constant = re.search(rf"%{re.escape(bound.group(1))} = s32\[\]\S* constant\((\d+)\)", body)
    return int(constant.group(1)) if constant else None


def instructions(text: str) -> Iterator[Instruction]:
    """Yield the instructions of a program, those of loops, fusions and all branches included."""
    computations, entry = _computations(text)

    def walk(name: str, times: int | None) -> Iterator[Instruction]:
        for line in computations[name]:
            if parsed := _parse(line, times):
                yield parsed
            trips: int | None = 1
            if " while(" in line:
                trips = _trip_count(line, computations)
            for called in _called(line):
                yield from walk(called, None if times is None or trips is None else times * trips)

    return walk(entry, 1)


@dataclass(frozen=True)
class Kernel:
    """A kernel: bytes that one run reads and writes, and FLOPs of its matrix products.

    op_name: path of the operation in the traced function.
    """

    instruction: Instruction
    bytes: int
    flops: float
    op_name: str


def kernels(text: str) -> Iterator[Kernel]:
    """Yield the kernels of a program without its collectives; see `schedule`."""
    for kernel in schedule(text):
        if kernel.instruction.kind.removesuffix(START) not in (*COLLECTIVES, DONE):
            yield kernel


def schedule(text: str) -> Iterator[Kernel]:
    """Yield all kernels and collectives in the order in which they are scheduled, loops entered.

    A kernel reads each operand and writes each output once, except that slices read only what they
    return, and updates in place write only the update. An asynchronous collective is its kind with
    "-start", then "done" with the name of the start as operand. The bytes of a collective are those
    of complete arrays.
    """
    computations, entry = _computations(text)
    parsed = {
        name: {each.name: each for line in lines if (each := _parse(line))}
        for name, lines in computations.items()
    }

    def walk(name: str, times: int) -> Iterator[Kernel]:
        started = set()
        for line in computations[name]:
            each = _parse(line, times)
            if each is None or each.kind in _FREE:
                continue
            called = [inner for inner in _called(line) if inner in parsed]
            start = _collective_start(each, [parsed[inner] for inner in called])
            if start:
                started.add(start.name)
                yield Kernel(start, _collective_bytes(start, each, parsed[name]), 0.0, "")
            elif each.kind in COLLECTIVES:
                yield Kernel(each, _collective_bytes(each, each, parsed[name]), 0.0, "")
            elif each.kind.endswith("-done"):
                if each.operands[0] in started:
                    yield Kernel(dataclasses.replace(each, kind=DONE), 0, 0.0, "")
            elif each.kind in _ENTERED:
                for inner in called:
                    if not re.search(rf"\bcondition=%?{re.escape(inner)}\b", line):
                        yield from walk(inner, _times_inside(each, computations))
            else:
                yield _kernel(each, parsed[name], [_inlined(inner, parsed) for inner in called])

    return walk(entry, 1)


def _inlined(name: str, parsed: dict[str, dict[str, Instruction]]) -> dict[str, Instruction]:
    """Return the instructions of a computation, in place of fusions inside it those of these.

    Parameters and results of a fusion inside become bitcasts.
    """
    body: dict[str, Instruction] = {}
    for each in parsed[name].values():
        if each.kind != "fusion":
            body[each.name] = each
            continue
        for inner in _inlined(_called(each.line)[0], parsed).values():
            kind, operands = inner.kind, tuple(f"{each.name}/{name}" for name in inner.operands)
            line = inner.line.lstrip()
            if number := re.search(r" parameter\((\d+)\)", line):
                kind, operands = "bitcast", (each.operands[int(number.group(1))],)
            result = f"{each.name}/{inner.name}"
            if line.startswith("ROOT "):
                body[each.name] = dataclasses.replace(each, kind="bitcast", operands=(result,))
            body[result] = dataclasses.replace(
                inner, name=result, kind=kind, operands=operands, line=line.removeprefix("ROOT ")
            )
    return body


def _times_inside(each: Instruction, computations: dict[str, list[str]]) -> int:
    """Return how often the computations run that an instruction enters.

    Loops of unknown length count as one iteration: they draw random numbers until one is accepted.
    """
    trips = _trip_count(each.line, computations) if each.kind == "while" else None
    return each.runs * (trips or 1)


def _collective_start(
    each: Instruction, called: list[dict[str, Instruction]]
) -> Instruction | None:
    """Return the start of an asynchronous collective with the shapes of its result, else None."""
    if each.kind == "async-start":
        inside = [inner for computation in called for inner in computation.values()]
        wrapped = [inner for inner in inside if inner.kind in COLLECTIVES]
        if not wrapped:
            return None
        kind, shapes, operands = wrapped[0].kind, wrapped[0].shapes, wrapped[0].operands
        return dataclasses.replace(each, kind=kind + START, shapes=shapes, operands=operands)
    if each.kind.removesuffix(START) not in COLLECTIVES or not each.kind.endswith(START):
        return None
    nested = re.search(r" = \(\(", each.line)  # ((operands), results)
    repeats = len(each.operands) if nested or each.kind == "all-gather-start" else 0
    return dataclasses.replace(each, shapes=each.shapes[repeats:])


def _collective_bytes(
    result: Instruction, operation: Instruction, scope: dict[str, Instruction]
) -> int:
    """Return the bytes of complete arrays: a gather's results, but a reduce-scatter's operands."""
    operands = (scope[name].bytes for name in operation.operands if name in scope)
    return max(result.bytes, sum(operands))


def _kernel(
    each: Instruction, scope: dict[str, Instruction], called: list[dict[str, Instruction]]
) -> Kernel:
    inside = [inner for computation in called for inner in computation.values()]
    flops = sum(
        product_flops(inner, {**scope, **computation})
        for computation in called
        for inner in computation.values()
    ) + product_flops(each, scope)
    names = re.findall(r'op_name="([^"]*)"', each.line)
    names += [name for inner in inside for name in re.findall(r'op_name="([^"]*)"', inner.line)]
    if each.kind in ("fusion", "fusion-start"):  # alone, or in an asynchronous wrapper
        moved = _fusion_bytes(each, called[0], scope)
    else:
        moved = _plain_bytes(each, scope)
    return Kernel(each, moved, flops, names[0] if names else "")


def _plain_bytes(each: Instruction, scope: dict[str, Instruction]) -> int:
    operands = [scope[name].bytes for name in each.operands if name in scope]
    if each.kind in _VIEWS:
        return 2 * each.bytes
    if each.kind == "dynamic-update-slice":
        return 2 * operands[1]
    if each.kind == "copy-start":
        return 2 * operands[0]
    return each.bytes + sum(operands)


def _fusion_bytes(
    each: Instruction, body: dict[str, Instruction], scope: dict[str, Instruction]
) -> int:
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for inner in body.values():
        for position, operand in enumerate(inner.operands):
            users.setdefault(operand, []).append((inner, position))

    def read(name: str) -> int:
        """Return the bytes that are read of a parameter, or of a view of it."""
        total = 0
        for user, position in users.get(name, []):
            if user.kind in ("bitcast", "reshape"):
                total += read(user.name)
            elif user.kind in _VIEWS and position == 0:
                total += user.bytes
            elif user.kind == "dynamic-update-slice" and position == 0:
                continue  # updated in place
            else:
                return body[name].bytes
        return min(total, body[name].bytes)

    def written(root: Instruction) -> int:
        if root.kind == "tuple":
            return sum(written(body[name]) for name in root.operands)
        if root.kind == "bitcast":
            return written(body[root.operands[0]])
        if root.kind == "dynamic-update-slice":
            return body[root.operands[1]].bytes
        return root.bytes

    parameters = [inner for inner in body.values() if inner.kind == "parameter"]
    roots = [inner for inner in body.values() if inner.line.lstrip().startswith("ROOT")]
    return sum(read(inner.name) for inner in parameters) + sum(map(written, roots))


def product_flops(each: Instruction, scope: dict[str, Instruction]) -> float:
    """Return the FLOPs of a matrix product, a convolution or an attention kernel, else 0."""
    if _PALLAS in each.line:
        return float(cost_estimate(each).get("flops", 0))
    if "dot_product_attention" in each.line and each.kind == "custom-call":
        return _attention_flops(each, scope)
    operands = [scope[name] for name in each.operands if name in scope]
    output = math.prod(each.shapes[0][1]) if each.shapes else 0
    if each.kind == "convolution":
        return _convolution_flops(each, operands)
    if each.kind == "dot" or (each.kind == "custom-call" and _LIBRARY_PRODUCT.search(each.line)):
        axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', each.line)
        dims = operands[0].shapes[0][1]
        contracted = [dims[int(axis)] for axis in re.findall(r"\d+", axes.group(1))] if axes else []
        return 2.0 * output * math.prod(contracted)
    return 0.0


def _convolution_flops(each: Instruction, operands: list[Instruction]) -> float:
    """Return the FLOPs of a convolution, the TPU compiler's form of a matrix product.

    Batches of matrices are spatial axes, of which the window leaves one position per output.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.line)
    assert labels, each.line
    arrays = (operands[0], operands[1], each)
    lhs, kernel, output = (
        dict(zip(label, array.shapes[0][1])) for label, array in zip(labels.groups(), arrays)
    )
    fields = re.search(r"window=\{([^}]*)\}", each.line)
    window = dict(field.split("=") for field in fields.group(1).split()) if fields else {}
    positions = 1
    for axis in filter(str.isdigit, labels.group(1)):
        values = {name: value.split("x")[int(axis)] for name, value in window.items()}
        positions *= _window_positions(
            lhs[axis],
            output[axis],
            size=int(values.get("size", 1)),
            stride=int(values.get("stride", 1)),
            pad=int(values.get("pad", "0_0").split("_")[0]),
            lhs_dilate=int(values.get("lhs_dilate", 1)),
            rhs_dilate=int(values.get("rhs_dilate", 1)),
        )
    return 2.0 * output["b"] * output["f"] * kernel["i"] * positions


@functools.cache
def _window_positions(
    inputs: int, outputs: int, *, size: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Return how many positions of a window fall on an input, along an axis, over all outputs."""
    positions = (
        output * stride - pad + offset * rhs_dilate
        for output in range(outputs)
        for offset in range(size)
    )
    inside = range(0, inputs * lhs_dilate, lhs_dilate)
    return sum(position in inside for position in positions)


def _attention_flops(each: Instruction, scope: dict[str, Instruction]) -> float:
    """Return the FLOPs of a fused attention: two products forward, five backward."""
    batch, tokens, heads, width = scope[each.operands[0]].shapes[0][1]
    number = 5 if "bwd" in each.line or "Backward" in each.line else 2
    return 2.0 * number * batch * heads * tokens * tokens * width


def cost_estimate(each: Instruction) -> dict[str, int]:
    """Return what a Pallas kernel of a TPU declares of itself; {} for other instructions."""
    declared = re.search(r'"cost_estimate":\{([^}]*)\}', each.line)
    if _PALLAS not in each.line or not declared:
        return {}
    return {name: int(value) for name, value in re.findall(r'"(\w+)":"(\d+)"', declared.group(1))}


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
