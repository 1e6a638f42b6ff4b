"""GGUF checkpoints: dequantised tensor by tensor straight into the wanted type, under Hugging Face names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES

from jaxserve.errors import CheckpointError
from jaxserve.weights.checkpoint import missing_tensor
from jaxserve.weights.gguf_config import hf_config_from_gguf, token_ids_from_gguf
from jaxserve.weights.gguf_header import GGUFTensor, read_gguf_header
from jaxserve.weights.gguf_names import ROPE_FREQUENCIES, hf_name
from jaxserve.weights.safetensors_files import name_list, read_bytes

_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Values dequantised at a time: temporaries of this size stay in a core's cache, which is four times faster.
_CHUNK_VALUES = 1 << 17


class GGUFCheckpoint:
    """One GGUF file of a llama-like decoder. `read` gives `dtype`, whatever the file stores."""

    def __init__(self, path: Path, *, dtype: np.dtype | type = ml_dtypes.bfloat16) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._header = read_gguf_header(path)
        factors = self._header.tensors.get(ROPE_FREQUENCIES)
        rope_factors = None if factors is None else self._values(factors, np.dtype(np.float32))
        self._config = hf_config_from_gguf(self._header, rope_factors)
        self._names = self._hugging_face_names()

    @property
    def name(self) -> str:
        """The file."""
        return str(self._path)

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's own metadata."""
        return self._header.metadata

    def tensor_names(self) -> list[str]:
        """Return the Hugging Face names."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._tensor(name).shape

    def read(self, name: str) -> np.ndarray:
        """Read and dequantise one tensor; q and k come back in Hugging Face's order of rotary dimensions."""
        return self.read_rows(name, range(self.shape(name)[0]))

    def read_rows(self, name: str, rows: range) -> np.ndarray:
        """Read and dequantise some rows of one tensor; of q and k, those of whole heads."""
        whole = self._tensor(name)
        row_bytes = whole.num_bytes // whole.shape[0]
        offset, num_bytes = whole.offset + rows.start * row_bytes, len(rows) * row_bytes
        tensor = replace(whole, shape=(len(rows), *whole.shape[1:]), offset=offset, num_bytes=num_bytes)
        values = self._values(tensor, self._dtype)
        if self._config["model_type"] == "llama" and ".q_proj." in name:
            return _undo_rope_order(values, self._config["num_attention_heads"] * len(rows) // whole.shape[0])
        if self._config["model_type"] == "llama" and ".k_proj." in name:
            return _undo_rope_order(values, self._config["num_key_value_heads"] * len(rows) // whole.shape[0])
        return values

    def hf_config(self) -> dict[str, Any]:
        """Return a config.json made from the metadata."""
        return self._config

    def generation_config(self) -> dict[str, Any]:
        """Return the bos, eos and pad ids."""
        return token_ids_from_gguf(self._header)

    def _hugging_face_names(self) -> dict[str, str]:
        named = {name: hf_name(name) for name in self._header.tensors if name != ROPE_FREQUENCIES}
        unknown = sorted(name for name, known in named.items() if known is None)
        if unknown:
            raise CheckpointError(f"{self._path} holds tensors with no known meaning: {name_list(unknown)}")
        return {known: name for name, known in named.items() if known is not None}

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._names:
            raise missing_tensor(self.name, name)
        return self._header.tensors[self._names[name]]

    def _values(self, tensor: GGUFTensor, dtype: np.dtype) -> np.ndarray:
        kind = tensor.type.name
        data = read_bytes(self._path, tensor.offset, tensor.num_bytes)
        if kind in _PLAIN:
            return data.view(_PLAIN[kind]).reshape(tensor.shape).astype(dtype, copy=False)
        if kind not in _QUANTIZED:
            known = ", ".join((*_PLAIN, *_QUANTIZED))
            raise CheckpointError(f"{self._path} holds {kind} tensors, which are not supported; supported are {known}")
        block_size, block_bytes = GGML_QUANT_SIZES[tensor.type]
        blocks = data.reshape(-1, block_bytes)
        values = np.empty((len(blocks), block_size), dtype)
        dequantize = getattr(quants, kind).dequantize_blocks
        step = _CHUNK_VALUES // block_size
        for start in range(0, len(blocks), step):
            values[start : start + step] = dequantize(blocks[start : start + step])
        return values.reshape(tensor.shape)


def _undo_rope_order(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rows of q or k back: llama.cpp rotates neighbours (0 1)(2 3), Hugging Face halves (0 d/2)(1 d/2+1).

    One head of four: llama.cpp's rows 0 2 1 3 are Hugging Face's rows 0 1 2 3.
    """
    rows = values.shape[0]
    paired = values.reshape(num_heads, rows // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)
