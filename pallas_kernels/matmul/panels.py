"""Weights in panels: rows side by side, so that a product of many tokens loads them as it needs them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

ALIGNMENT = 64  # bytes, of the arrays of XLA:CPU


def to_panels(weight: np.ndarray, columns: int) -> np.ndarray:
    """The values of `weight` [.., rows, depth] in the order of panels, in an array of the same shape.

    Each matrix becomes panels [depth, columns] of so many of its rows, one after the other; the last has what rows are
    left. `native.panel_columns` says how many this processor takes. Of bfloat16, of which the depth must be even, two
    neighbours in depth stay together: panels are [depth / 2, columns, 2].

    >>> to_panels(np.array([[1, 2, 3], [4, 5, 6]], np.float32), columns=16).ravel().tolist()
    [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    """
    if weight.itemsize == 2:
        return to_panels(np.ascontiguousarray(weight).view(np.float32), columns).view(weight.dtype)
    *_, rows, depth = weight.shape
    whole = rows // columns * columns
    turned = _aligned_empty(weight.shape, weight.dtype)
    matrices = weight.reshape(-1, rows, depth)
    for matrix, out in zip(matrices, turned.reshape(len(matrices), rows * depth), strict=True):
        panels = out[: whole * depth].reshape(-1, depth, columns)
        panels[...] = matrix[:whole].reshape(-1, columns, depth).swapaxes(1, 2)
        out[whole * depth :].reshape(depth, -1)[...] = matrix[whole:].T
    return turned


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Fresh memory that JAX takes for an array on the CPU as it is; of other memory it makes a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + num_bytes].view(dtype).reshape(shape)


def panel_rows(weight: jax.Array, rows: jax.Array, columns: int) -> jax.Array:
    """`matrix[rows]` of a matrix whose panels `weight` [.., depth] holds: [count, depth]. Below 2**31 values.

    >>> panel_rows(jnp.asarray(to_panels(np.arange(24.0, dtype=np.float32).reshape(12, 2), 8)), jnp.array([9, 3]), 8)
    Array([[18., 19.],
           [ 6.,  7.]], dtype=float32)
    """
    num_rows, depth = weight.shape
    values = weight.reshape(-1, 4 // weight.dtype.itemsize)  # each with the neighbours that it stays with
    units = depth // values.shape[1]
    first = rows // columns * columns
    width = jnp.minimum(columns, num_rows - first)
    places = first * units + rows - first
    return values[places[:, None] + jnp.arange(units) * width[:, None]].reshape(-1, depth)
