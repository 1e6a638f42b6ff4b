"""Parameters of layers before they have values."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike


def parameter(
    shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike, *, matrix_axes: int | None = None
) -> nnx.Param:
    """A parameter without a value: its shape, dtype and logical axes, filled when the checkpoint is read.

    `matrix_axes`: its values lie in panels of matrices (`to_panels`), each of so many last axes.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, matrix_axes=matrix_axes)
