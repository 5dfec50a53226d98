"""What the operations of a compiled train step are for, told by the program's text.

XLA's own names ("loop_add_fusion.3") say little; what an instruction does, what is fused in it and
the path of flax modules that it comes from say more.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MATMUL, ATTENTION, ELEMENTWISE = "matmul", "attention", "norms and elementwise"
OPTIMIZER, MASKS, COPIES = "optimizer", "masks", "copies and transposes"
COLLECTIVES, IDLE = "collectives", "idle"
CATEGORIES = (MATMUL, ATTENTION, ELEMENTWISE, OPTIMIZER, MASKS, COPIES, COLLECTIVES, IDLE)

# Their time is that of the operations within, which are seen themselves.
CONTROL = {"while", "conditional", "call"}
_DOTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
_MOVING = {
    *("copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad"),
    *("gather", "scatter", "reverse", "copy-start", "copy-done"),
}
_FREE = {
    *("parameter", "constant", "bitcast", "reshape", "broadcast", "iota", "tuple"),
    *("get-tuple-element", "convert"),
}
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-)", re.IGNORECASE
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(")
_PATH = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FUSED = re.compile(r"\bcalls=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
# Kernels of libraries and of the driver, which have names of their own.
_KERNELS = (
    (ATTENTION, r"fmha|flash|sdpa|attention"),
    (COLLECTIVES, r"nccl|all.?reduce|all.?gather|reduce.?scatter"),
    (MATMUL, r"gemm|nvjet|cutlass|xmma|cublas|_dot|conv"),
    (COPIES, r"memcpy|memset|copy|transpose"),
    (MASKS, r"cub::|sort|threefry|rng"),
)


@dataclass(frozen=True)
class Operation:
    """One instruction of a program.

    opcode: "fusion", "dot", ...; path: of the function and modules that it comes from; target: of a
    custom call; inside: opcodes of what is fused in it; operands: names of what it reads.
    """

    name: str
    opcode: str
    path: str = ""
    target: str = ""
    inside: frozenset[str] = frozenset()
    operands: tuple[str, ...] = ()


def operations(text: str) -> dict[str, Operation]:
    """All instructions of a program (`compiled.as_text()`) by their names."""
    opcodes: dict[str, set[str]] = {}
    lines: list[tuple[str, str, str]] = []
    computation = ""
    for line in text.splitlines():
        head, found = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if head:
            computation = head.group(1)
        elif found:
            lines.append((found.group(1), found.group(2), line))
            opcodes.setdefault(computation, set()).add(found.group(2))
    return {name: _operation(name, opcode, line, opcodes) for name, opcode, line in lines}


def _operation(name: str, opcode: str, line: str, opcodes: Mapping[str, set[str]]) -> Operation:
    first = lambda pattern: found.group(1) if (found := pattern.search(line)) else ""
    inside = frozenset(opcodes.get(first(_FUSED), ())) if opcode == "fusion" else frozenset()
    reads = line.partition(f" {opcode}(")[2].partition(")")[0]
    operands = tuple(_OPERAND.findall(reads))
    return Operation(name, opcode, first(_PATH), first(_TARGET), inside, operands)


def by_kernel_name(found: Mapping[str, Operation]) -> dict[str, Operation]:
    """The same under the names of their kernels, which have no dots and dashes."""
    return {re.sub(r"\W", "_", name): operation for name, operation in found.items()}


def category(operation: Operation) -> str:
    """One of CATEGORIES, but for IDLE.

    Attention is all that lies between its projections; those are matrix products like others. What
    only moves numbers, or fills arrays with one, counts as copies, wherever it comes from.
    """
    within = operation.inside or {operation.opcode}
    if _COLLECTIVE.match(operation.opcode):
        return COLLECTIVES
    if within & _DOTS or _named(operation.target) in (MATMUL, ATTENTION):
        return ATTENTION if _in_attention(operation) else MATMUL
    if within <= _MOVING | _FREE and (within & _MOVING or "convert" not in within):
        return COPIES
    if operation.path and "jvp(" not in operation.path:
        drawn = "sort" in within or re.search(r"threefry|uniform|random|sort", operation.path)
        return MASKS if drawn else OPTIMIZER
    return ATTENTION if _in_attention(operation) else ELEMENTWISE


def _in_attention(operation: Operation) -> bool:
    if _named(operation.target) == ATTENTION:
        return True
    return bool(re.search(r"/attn/(?!qkv/|proj/)", operation.path))


def _named(name: str) -> str | None:
    """A category by a name of a kernel or custom call alone; None where it tells nothing."""
    name = name.lower()
    return next((kind for kind, pattern in _KERNELS if re.search(pattern, name)), None)


def kernel_category(name: str) -> str:
    """Of a kernel that is no instruction's."""
    return _named(name) or ELEMENTWISE


def part(operation: Operation) -> str:
    """Which part of the step it belongs to, as in "decoder backward".

    XLA adds operations that come from nowhere, most of them copies.
    """
    path = operation.path
    if "jvp(" not in path:
        outside = MASKS if category(operation) == MASKS else "optimizer and metrics"
        return outside if path else "added by XLA"
    module = next((name for name in ("encoder", "decoder") if f"/{name}" in path), "loss")
    return f"{module} {'backward' if 'transpose(jvp(' in path else 'forward'}"
