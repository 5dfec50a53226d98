"""Kernels of a compiled XLA program: the bytes that they move, and the FLOPs of their products."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.hlo import (
    COLLECTIVES,
    LIBRARY_PRODUCT,
    Instruction,
    called_by,
    computations_of,
    parse,
    trip_count,
)

START, DONE = "-start", "done"  # of an asynchronous collective
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "async-update"}
_VIEWS = ("slice", "dynamic-slice", "gather")  # they read no more than they return
_ENTERED = ("while", "conditional", "call", "async-start")  # run the kernels of a computation
_BESIDE = ("parameter", "tuple", *COLLECTIVES)  # of a collective that runs beside a fusion
_ASYNC_COLLECTIVE = re.compile(r'custom_call_target="AsyncCollective(Start|Done)"')
_PALLAS = 'custom_call_target="tpu_custom_call"'


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
    computations, entry = computations_of(text)
    parsed = {
        name: {each.name: each for line in lines if (each := parse(line))}
        for name, lines in computations.items()
    }

    def walk(name: str, times: int) -> Iterator[Kernel]:
        started = set()
        for line in computations[name]:
            each = parse(line, times)
            if each is None or each.kind in _FREE:
                continue
            called = [inner for inner in called_by(line) if inner in parsed]
            start = _collective_start(each, [parsed[inner] for inner in called])
            if part := _fused_collective(each, [parsed[inner] for inner in called]):
                yield part
            elif start:
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
        for inner in _inlined(called_by(each.line)[0], parsed).values():
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
    trips = trip_count(each.line, computations) if each.kind == "while" else None
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


def _fused_collective(each: Instruction, called: list[dict[str, Instruction]]) -> Kernel | None:
    """Return the start or the end of a collective that a TPU computes in parts beside products.

    Both are fusions around the collective, whose channel tells which belong together.
    """
    for computation in called if each.kind == "fusion" else ():
        inside = list(computation.values())
        targets = [_ASYNC_COLLECTIVE.search(inner.line) for inner in inside]
        for end in filter(None, targets):
            (wrapped,) = (inner for inner in inside if inner.kind in COLLECTIVES)
            name = re.findall(r"channel_id=\d+", wrapped.line)[0]
            if end.group(1) == "Done":
                return Kernel(dataclasses.replace(each, kind=DONE, operands=(name,)), 0, 0.0, "")
            start = dataclasses.replace(
                each, name=name, kind=wrapped.kind + START, shapes=wrapped.shapes
            )
            return Kernel(start, _collective_bytes(wrapped, wrapped, computation), 0.0, "")
    return None


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
            elif user.kind in _BESIDE or (user.kind == "dynamic-update-slice" and position == 0):
                continue  # not read here, or updated in place
            else:
                return body[name].bytes
        return min(total, body[name].bytes)

    def written(root: Instruction) -> int:
        if root.kind == "tuple":
            results = [body[name] for name in root.operands]
            return sum(written(each) for each in results if each.kind not in _BESIDE)
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
    if each.kind == "dot" or (each.kind == "custom-call" and LIBRARY_PRODUCT.search(each.line)):
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
