"""Reads compiled programs: what XLA's text holds, and what ptxas said of the kernels inside."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from jaxserve.plan.hlo import instructions

_SORT_DIMENSION = re.compile(r"dimensions=\{(\d+)\}")

# Opcodes that pass a buffer on, or hand it to a kernel that writes to it in place.
_PASSES_ON = {
    "parameter", "bitcast", "get-tuple-element", "tuple", "custom-call", "opt-barrier", "while", "conditional", "call",
}  # fmt: skip

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)")
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized[^\n]*")


def pool_makers(hlo: str, pool_elements: int) -> list[str]:
    """Instructions that make an array as large as a pool, other than kernels that write to it in place.

    >>> pool_makers("  %copy.3 = bf16[7,16,2,64]{3,2,1,0} copy(%pool)", 7 * 16 * 2 * 64)
    ['copy']
    """
    return [
        instruction.opcode
        for instruction in instructions(hlo)
        if instruction.opcode not in _PASSES_ON
        and any(math.prod(shape) == pool_elements for shape in instruction.shapes)
    ]


def sort_lengths(hlo: str) -> list[int]:
    """Elements along the axis of each sort.

    >>> sort_lengths("  %sort.1 = f32[8,1002]{1,0} sort(%a), dimensions={1}, to_apply=%less")
    [1002]
    """
    lengths = []
    for instruction in instructions(hlo):
        if instruction.opcode == "sort" and (dimension := _SORT_DIMENSION.search(instruction.line)):
            lengths.append(instruction.shapes[0][int(dimension[1])])
    return lengths


def sorts_vocabulary(hlo: str, vocab_size: int, num_shards: int) -> list[int]:
    """Lengths of sorts along the vocabulary or a device's share of it, padded by up to 128 elements.

    >>> sorts_vocabulary("  %sort.1 = f32[8,1024]{1,0} sort(%a), dimensions={1}, to_apply=%less", 4000, 4)
    [1024]
    """
    return [
        length
        for length in sort_lengths(hlo)
        if any(size <= length <= size + 128 for size in (vocab_size, vocab_size // num_shards))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """What the compilers said of one Mosaic GPU kernel."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]


def kernel_reports(folder: Path) -> list[KernelReport]:
    """Reads what MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_MLIR_PASSES left in `folder`, a kernel a file."""
    reports = []
    for path in sorted(folder.glob("*.ptxas")):
        text = path.read_text(errors="replace")
        passes = path.with_suffix(".mlir-passes.log")
        shared = _SHARED.findall(passes.read_text(errors="replace")) if passes.exists() else []
        reports.append(
            KernelReport(
                name=path.stem,
                registers=max(map(int, _REGISTERS.findall(text)), default=0),
                spill_bytes=max((int(number) for pair in _SPILLS.findall(text) for number in pair), default=0),
                shared_bytes=max(map(int, shared), default=0),
                warnings=tuple(_SERIALIZED.findall(text)),
            )
        )
    return reports
