"""Reads the text of compiled programs: their instructions, and what they send between devices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<opcode>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\w+\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"^(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a compiled program: all arrays that it makes, and how."""

    name: str
    opcode: str
    shapes: tuple[tuple[int, ...], ...]
    line: str
    computation: str  # that it is a line of: the program's entry, a fusion, a loop's body


def instructions(hlo: str) -> Iterator[Instruction]:
    """Every instruction of a program and of its fusions.

    >>> line = "  %sort.1 = (f32[8,16]{1,0:T(8,128)}, s32[8,16]{1,0}) sort(%a, %b), dimensions={1}, to_apply=%less"
    >>> [(found.opcode, found.shapes) for found in instructions(line)]
    [('sort', ((8, 16), (8, 16)))]
    """
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        elif match := _INSTRUCTION.match(line):
            arrays = _ARRAY.findall(match["shape"])
            shapes = tuple(tuple(int(size) for size in array.split(",") if size) for array in arrays)
            yield Instruction(match["name"], match["opcode"], shapes, line.strip(), computation)


def collectives(hlo: str) -> dict[str, int]:
    """How often each kind of communication between devices is started.

    >>> collectives("  %a = f32[8]{0} all-reduce-start(%x)\\n  %b = f32[8]{0} all-reduce-done(%a)")
    {'all-reduce': 1}
    """
    found = Counter(
        match[1]
        for instruction in instructions(hlo)
        if (match := _COLLECTIVE.match(instruction.opcode)) and not instruction.opcode.endswith("-done")
    )
    return dict(sorted(found.items()))
