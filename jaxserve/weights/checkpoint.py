"""What every kind of checkpoint offers, and the one function that opens them."""

from __future__ import annotations

from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.weights.source import ModelSource


class Checkpoint(Protocol):
    """Named tensors and the model's config, whatever the files look like. `read` may be called from several threads."""

    @property
    def name(self) -> str:
        """The path or a word for it, for error messages."""
        ...

    def tensor_names(self) -> list[str]:
        """Return the names that Hugging Face gives the tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into fresh memory; bfloat16 and float8 come as ml_dtypes' types."""
        ...

    def read_rows(self, name: str, rows: range) -> np.ndarray:
        """Read some rows of one tensor, and no others where the files allow it."""
        ...

    def hf_config(self) -> dict[str, Any]:
        """Return config.json, or the same made from the file's metadata."""
        ...

    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, or an empty dict."""
        ...


def open_checkpoint(source: ModelSource, *, dtype: np.dtype | type = ml_dtypes.bfloat16) -> Checkpoint:
    """Open the weights of a source.

    `dtype` is what quantised GGUF tensors are dequantised to, so that no float32 copy is ever made; safetensors come
    as they are stored.
    """
    if source.kind == "gguf":
        from jaxserve.weights.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(source.path, dtype=dtype)
    from jaxserve.weights.safetensors_files import SafetensorsCheckpoint

    return SafetensorsCheckpoint(source.path)


def missing_tensor(checkpoint: str, name: str) -> CheckpointError:
    """Return the error for a tensor that a checkpoint does not hold."""
    return CheckpointError(f"{checkpoint} has no tensor {name!r}")
