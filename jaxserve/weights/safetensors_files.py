"""Safetensors checkpoints: a folder with one file, or with shards and an index.

Tensors are read with positioned reads into fresh memory rather than mapped: pages of a mapping count as the process's
memory and stay until evicted, a file that shrinks under a mapping kills the process, and large reads are what network
file systems are good at.

    u64 length of the header | JSON header: name -> dtype, shape, [begin, end) | tensor data
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.weights.checkpoint import missing_tensor

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ALIGNMENT_BYTES = 64  # what XLA asks of a host buffer that it may use in place


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class SafetensorsCheckpoint:
    """A Hugging Face model folder whose weights are safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = read_json(folder / "config.json")
        self._tensors: dict[str, _Tensor] = {}
        wanted = _read_index(folder)
        for file in sorted(set(wanted.values())) if wanted else [_single_file(folder)]:
            self._tensors.update(_read_header(file))
        absent = sorted(name for name in wanted if name not in self._tensors)
        if absent:
            raise CheckpointError(f"{folder / INDEX_NAME} names tensors that no shard holds: {name_list(absent)}")

    @property
    def name(self) -> str:
        """The folder."""
        return str(self._folder)

    def tensor_names(self) -> list[str]:
        """Return all names, of all shards."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._tensor(name).shape

    def read(self, name: str) -> np.ndarray:
        """Read one tensor as it is stored."""
        tensor = self._tensor(name)
        data = read_bytes(tensor.file, tensor.offset, math.prod(tensor.shape) * tensor.dtype.itemsize)
        return data.view(tensor.dtype).reshape(tensor.shape)

    def read_rows(self, name: str, rows: range) -> np.ndarray:
        """Read some rows of one tensor as they are stored."""
        tensor = self._tensor(name)
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = read_bytes(tensor.file, tensor.offset + rows.start * row_bytes, len(rows) * row_bytes)
        return data.view(tensor.dtype).reshape(len(rows), *tensor.shape[1:])

    def hf_config(self) -> dict[str, Any]:
        """Return config.json."""
        return self._config

    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, or an empty dict."""
        path = self._folder / "generation_config.json"
        return read_json(path) if path.exists() else {}

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise missing_tensor(self.name, name)
        return self._tensors[name]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; one clear line when it is missing or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def read_bytes(path: Path, offset: int, num_bytes: int) -> np.ndarray:
    """Read part of a file into fresh, aligned memory: uint8[num_bytes]."""
    buffer = np.empty(num_bytes + _ALIGNMENT_BYTES, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    data = buffer[start : start + num_bytes]
    try:
        with path.open("rb", buffering=0) as file:
            position = 0
            while position < num_bytes:
                count = os.preadv(file.fileno(), [data[position:].data], offset + position)
                if count == 0:
                    raise CheckpointError(f"{path} was truncated while it was read")
                position += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return data


def name_list(names: list[str], limit: int = 8) -> str:
    """Join names for an error message, the first few of them.

    >>> name_list(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _single_file(folder: Path) -> Path:
    """Return the only safetensors file of a folder without an index."""
    if (folder / SINGLE_NAME).exists():
        return folder / SINGLE_NAME
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{folder} has {len(files)} .safetensors files but no {INDEX_NAME}")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it to safetensors" if pickles else ""
    if ggufs := sorted(folder.glob("*.gguf")):
        hint = f"; to load the GGUF file in it, give its path: {ggufs[0]}"
    raise CheckpointError(f"{folder} has no .safetensors file{hint}")


def _read_index(folder: Path) -> dict[str, Path]:
    """Return tensor name -> shard, or nothing when there is no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'")
    for shard in weight_map.values():
        # A shard is a plain file name: an index must not reach out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} names the shard {shard!r:.80}, which is not a file name")
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).exists():
            raise CheckpointError(f"{path} names the shard {shard!r}, which is missing")
    return {name: folder / shard for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, _Tensor]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int, size: int) -> _Tensor:
    """Check one entry of the header against the file's size."""
    try:
        code, shape = entry["dtype"], tuple(int(dim) for dim in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged: the header's entry for {name!r} is malformed") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} is of type {code!r:.80}; supported are {', '.join(DTYPES)}")
    dtype = DTYPES[code]
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path} is damaged: {name!r} has shape {shape} of {code} in {end - begin} bytes")
    if start + end > size:
        raise CheckpointError(
            f"{path} is truncated: tensor {name!r} ends at byte {start + end}, the file has {size}; download it again"
        )
    return _Tensor(path, dtype, shape, start + begin)
