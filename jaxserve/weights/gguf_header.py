"""The header of a GGUF file: its metadata and its table of tensors, read in one pass of plain Python.

The gguf package's reader makes several numpy views for every one of the 100,000 strings of a vocabulary, which takes
seconds; this takes a tenth of one. Values are still dequantised by the gguf package.

    magic "GGUF" | u32 version | u64 tensors | u64 entries | entries | tensor infos | padding | tensor data
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # of a tensor of GGML


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies in the file, and how it is stored."""

    shape: tuple[int, ...]  # row-major, as numpy and Hugging Face write it
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """All of a GGUF file but its tensor data."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header; arrays of numbers become numpy arrays, arrays of strings become lists."""
    try:
        size = path.stat().st_size
        if size < 24:
            raise CheckpointError(f"{path} is not a GGUF file: it has only {size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _HeaderParser(path, data).parse()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: its header cannot be read ({error})") from error


class _HeaderParser:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def parse(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not start with 'GGUF'")
        self.position = 4
        version = self._scalar("I")
        if version not in (2, 3):
            hint = " (a big-endian file)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path} is of GGUF version {version}{hint}; versions 2 and 3 are supported")
        num_tensors, num_entries = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(num_entries):
            key = self._string()
            if key in metadata:
                raise CheckpointError(f"{self.path} is damaged: it holds the metadata {key!r:.80} twice")
            metadata[key] = self._value(self._scalar("I"))
        return GGUFHeader(self.path, metadata, self._tensors(num_tensors, metadata))

    def _tensors(self, num_tensors: int, metadata: dict[str, Any]) -> dict[str, GGUFTensor]:
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name, num_dims = self._string(), self._scalar("I")
            if name in infos:
                raise CheckpointError(f"{self.path} is damaged: it holds the tensor {name!r:.80} twice")
            if num_dims > _MAX_DIMS:
                raise CheckpointError(f"{self.path} is damaged: tensor {name!r:.80} has {num_dims} dimensions")
            infos[name] = (tuple(reversed(self._scalars("Q", num_dims))), self._scalar("I"), self._scalar("Q"))
        values = CheckpointValues(metadata, str(self.path))
        alignment = values.positive_integer("general.alignment", default=_DEFAULT_ALIGNMENT)
        if alignment & (alignment - 1):
            raise CheckpointError(f"{self.path} is damaged: alignment {alignment} is not a power of two")
        start, end, tensors = _aligned(self.position, alignment), 0, {}
        for name, (shape, kind, offset) in infos.items():
            if offset != end:  # each lies right behind the one before, and llama.cpp takes no other file
                raise CheckpointError(
                    f"{self.path} is damaged: tensor {name!r} is said to begin at byte {offset} of the data, "
                    f"the one before it ends at {end}"
                )
            tensors[name] = self._tensor(name, shape, kind, start + offset)
            end += _aligned(tensors[name].num_bytes, alignment)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} is of the unknown type {kind}") from error
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or min(shape) < 1 or shape[-1] % block_size:
            raise CheckpointError(f"{self.path}: tensor {name!r} of shape {shape} has no whole {quantization.name} row")
        num_bytes = math.prod(shape) // block_size * block_bytes
        if offset + num_bytes > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name!r} ends at byte {offset + num_bytes}, "
                f"the file has {len(self.data)}"
            )
        return GGUFTensor(shape, quantization, offset, num_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is damaged: metadata of the unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[str] | np.ndarray:
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == _STRING:
            return self._strings(count)
        if kind not in _SCALARS:  # nor are there arrays of arrays
            raise CheckpointError(f"{self.path} is damaged: an array of the unknown type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        values = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        return values.copy()

    def _strings(self, count: int) -> list[str]:
        """Read `count` strings; local names and one unpack a string, for vocabularies have 100,000 and more."""
        data, position, unpack, strings = self.data, self.position, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            (length,) = unpack(data, position)
            position += 8 + length
            if position > len(data):
                raise CheckpointError(f"{self.path} is truncated: it ends inside a list of strings")
            strings.append(data[position - length : position].decode("utf-8"))
        self.position = position
        return strings

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8")

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{count}{code}")
        return values

    def _take(self, num_bytes: int) -> bytes:
        if self.position + num_bytes > len(self.data):
            raise CheckpointError(f"{self.path} is truncated: its header ends at byte {len(self.data)}")
        taken = self.data[self.position : self.position + num_bytes]
        self.position += num_bytes
        return taken


def _aligned(position: int, alignment: int) -> int:
    """The next multiple of `alignment`, a power of two.

    >>> _aligned(33, 32), _aligned(64, 32)
    (64, 64)
    """
    return -(-position // alignment) * alignment
