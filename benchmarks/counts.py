"""What a compiled XLA program does beside its collectives, counted from its text.

Each instruction counts as often as it runs, those inside fusions too (benchmarks/hlo.py).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from benchmarks import hlo

KINDS = ("transpose", "copy", "gather", "scatter", "sort", "convert", "while")

_LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:matmul|gemm|conv)', re.IGNORECASE)
_LOWERED_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.* : \((.*)\) -> ")
_PRECISION = re.compile(r"[lr]hs_precision_type = (\w+)")


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution: the types of both operands, and where it comes from."""

    operands: tuple[str, ...]
    source: str
    times: int = 1


def counts(text: str, kinds: Collection[str] = KINDS) -> dict[str, int]:
    """How often the instructions of each kind run.

    Raises:
      ValueError: one lies in a loop of unknown length.
    """
    found = dict.fromkeys(kinds, 0)
    for line, times in hlo.as_run(text):
        instruction = hlo.INSTRUCTION.search(line)
        if instruction and instruction.group(3) in found:
            found[instruction.group(3)] += hlo.known(times, line)
    return found


def products(text: str) -> list[Product]:
    """All products of a compiled program, those of libraries too.

    Raises:
      ValueError: one lies in a loop of unknown length.
    """
    types, found = hlo.types_of(text), []
    for line, times in hlo.as_run(text):
        instruction = hlo.INSTRUCTION.search(line)
        if instruction and _is_product(instruction.group(3), line):
            operands = re.findall(r"%([\w.-]+)", instruction.group(4))[:2]
            source = re.search(r'op_name="([^"]*)"', line)
            name = source.group(1) if source else instruction.group(1)
            known = hlo.known(times, line)
            found.append(Product(tuple(types[operand] for operand in operands), name, known))
    return found


def lowered_products(text: str) -> list[Product]:
    """All products of a program that is not compiled yet (`lowered.as_text()`), as it is written.

    Where a product says in which types it multiplies, these are its operands'.
    """
    found = []
    for line in text.splitlines():
        product = _LOWERED_PRODUCT.search(line)
        if product:
            types = re.findall(r"tensor<(?:\d+x)*(\w+)>", product.group(1))
            found.append(Product(tuple(_PRECISION.findall(line) or types), line.strip()))
    return found


def float32(found: Collection[Product]) -> list[Product]:
    """Those of them that have an operand of type float32."""
    return [product for product in found if "f32" in product.operands]


def _is_product(kind: str, line: str) -> bool:
    library = kind == "custom-call" and _LIBRARY_PRODUCT.search(line)
    return kind in ("dot", "convolution") or bool(library)
