"""Random weights for any config: to measure speed and to test without a download."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.weights.checkpoint import missing_tensor

_STANDARD_DEVIATION = 0.02  # small enough that activations of deep models stay finite in bfloat16
_PERIOD = 1 << 20  # values drawn once and repeated: drawing 10^10 of them would take minutes


class DummyCheckpoint:
    """A checkpoint with the given tensors, the same values in every run. Norm weights are 1, biases 0."""

    def __init__(
        self,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: np.dtype | type = ml_dtypes.bfloat16,
        seed: int = 0,
    ) -> None:
        """`shapes`: Hugging Face name -> shape, all that the model's weight rules ask for."""
        self._config = dict(config)
        self._shapes = dict(shapes)
        self._dtype = np.dtype(dtype)
        self._seed = seed
        drawn = np.random.default_rng(seed).standard_normal(_PERIOD, np.float32)
        self._pool = (drawn * _STANDARD_DEVIATION).astype(self._dtype)

    @property
    def name(self) -> str:
        """A word for error messages."""
        return "the dummy checkpoint"

    def tensor_names(self) -> list[str]:
        """Return the given names."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the given shape."""
        if name not in self._shapes:
            raise missing_tensor(self.name, name)
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Return the tensor's values, which depend on its name and the seed alone."""
        shape = self.shape(name)
        if name.endswith(".bias"):
            return np.zeros(shape, self._dtype)
        if len(shape) == 1:
            return np.ones(shape, self._dtype)
        values = np.empty(shape, self._dtype)
        flat = values.reshape(-1)
        start = zlib.crc32(f"{self._seed} {name}".encode()) % _PERIOD
        # An odd period, so that the rows of a matrix with a power-of-two width are not copies of each other.
        period = np.concatenate([self._pool[start:], self._pool[:start]])[: _PERIOD - 1]
        for begin in range(0, flat.size, period.size):
            part = flat[begin : begin + period.size]
            part[:] = period[: part.size]
        return values

    def read_rows(self, name: str, rows: range) -> np.ndarray:
        """Return some rows of `read`."""
        return self.read(name)[rows.start : rows.stop]

    def hf_config(self) -> dict[str, Any]:
        """Return the given config."""
        return self._config

    def generation_config(self) -> dict[str, Any]:
        """Return nothing: a dummy has no defaults for sampling."""
        return {}
