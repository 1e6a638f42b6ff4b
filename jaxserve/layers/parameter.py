"""Parameters of layers before they have values."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike


def parameter(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    """A parameter without a value: its shape, dtype and logical axes, filled when the checkpoint is read."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)
