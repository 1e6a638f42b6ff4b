"""Reads compiled programs: what XLA's text holds, and what ptxas said of the kernels inside."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jaxserve.plan.hlo import instructions

_OPERAND = re.compile(r"slice\(%?([\w.\-]+)")
_SLICE_START = re.compile(r"\[(\d+):\d+(?::\d+)?\]")
_ITEM_BITS = re.compile(r"= [a-z]+(\d+)")  # of s32[..], bf16[..]
_SORT_DIMENSION = re.compile(r"dimensions=\{(\d+)\}")
_CALLS = re.compile(r" calls=%?([\w.\-]+)")
_ALIASING = re.compile(r"output_to_operand_aliasing=\{(.*?\))\}")
_ALIASED_OUTPUT = re.compile(r"\{(\d*)\}: \(\d+, ")

# Opcodes that pass a buffer on.
_PASSES_ON = {"parameter", "bitcast", "get-tuple-element", "tuple", "opt-barrier", "while", "conditional", "call"}

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)")
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized[^\n]*")


def pool_makers(hlo: str, pool_elements: int) -> list[str]:
    """Instructions that make an array as large as a pool, other than kernels that write to it in place.

    A kernel does so where its custom call says that the result aliases an operand. XLA may wrap it in a fusion, with
    slices of the other operands, which saves copies of these; such a fusion makes what the calls in it make: nothing,
    if each of its results of that size is one that they write in place.

    >>> pool_makers("  %copy.3 = bf16[7,16,2,64]{3,2,1,0} copy(%pool)", 7 * 16 * 2 * 64)
    ['copy']
    >>> call = "  ROOT %call.1 = (s32[8]{0}, bf16[7,16]{1,0}) custom-call(%slots, %pool)"
    >>> pool_makers(call, 7 * 16), pool_makers(call + ", output_to_operand_aliasing={{1}: (1, {})}", 7 * 16)
    (['custom-call'], [])
    """
    large = [
        (instruction, [index for index, shape in enumerate(instruction.shapes) if math.prod(shape) == pool_elements])
        for instruction in instructions(hlo)
        if instruction.opcode not in _PASSES_ON
    ]
    written: Counter[str] = Counter()  # a computation: results of this size that its kernels write in place
    makers = []
    for instruction, outputs in large:  # a computation comes before the fusion that calls it
        if instruction.opcode == "custom-call":
            in_place = _aliased_outputs(instruction.line).intersection(outputs)
            written[instruction.computation] += len(in_place)
        elif instruction.opcode == "fusion" and (calls := _CALLS.search(instruction.line)):
            in_place = outputs[: written[calls[1]]]
        else:
            in_place = ()
        if len(in_place) < len(outputs):
            makers.append(instruction.opcode)
    return makers


def _aliased_outputs(custom_call: str) -> set[int]:
    """Which outputs of a custom call lie in an operand's buffer.

    >>> sorted(_aliased_outputs("... output_to_operand_aliasing={{1}: (4, {}), {2}: (5, {})}, api_version=X"))
    [1, 2]
    >>> _aliased_outputs("... output_to_operand_aliasing={{}: (10, {})}"), _aliased_outputs("custom-call(%x)")
    ({0}, set())
    """
    aliasing = _ALIASING.search(custom_call)
    return {int(index or 0) for index in _ALIASED_OUTPUT.findall(aliasing[1])} if aliasing else set()


KERNEL_ALIGNMENT = 256  # bytes that Mosaic GPU's kernels are compiled to expect of the addresses of their arguments


def unaligned_operands(hlo: str) -> list[str]:
    """Slices that a kernel is given as addresses inside a larger array, and that do not start where kernels expect it.

    XLA wraps such a kernel and the slices in one fusion, and does not care where a slice starts.
    """
    found = list(instructions(hlo))
    fused = {calls[1] for one in found if one.opcode == "fusion" and (calls := _CALLS.search(one.line))}
    kernels = {one.computation for one in found if 'custom_call_target="mosaic_gpu' in one.line} & fused
    inside = [one for one in found if one.computation in kernels]
    shapes = {(one.computation, one.name): one.shapes for one in inside}
    unaligned = [one.name for one in inside if one.opcode == "dynamic-slice"]  # it may start anywhere
    for one in inside:
        if one.opcode == "slice" and (operand := _OPERAND.search(one.line)) and (bits := _ITEM_BITS.search(one.line)):
            (shape,) = shapes[one.computation, operand[1]]
            starts = map(int, _SLICE_START.findall(one.line.partition("slice={")[2]))
            offset = sum(start * math.prod(shape[axis + 1 :]) for axis, start in enumerate(starts))
            if offset * int(bits[1]) // 8 % KERNEL_ALIGNMENT:
                unaligned.append(one.name)
    return unaligned


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
