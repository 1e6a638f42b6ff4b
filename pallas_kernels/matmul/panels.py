"""Weights in panels: 32 rows side by side, so that a product of many tokens loads them as it needs them."""

import numpy as np

COLUMNS = 32  # of a panel, as pallas_kernels/native/src/matmul_panels.h has it


def to_panels(weight: np.ndarray) -> np.ndarray:
    """The values of `weight` [.., rows, depth] in the order of panels, in an array of the same shape.

    Each matrix becomes panels [depth, 32] of 32 of its rows, one after the other; the last has what rows are left. Of
    bfloat16, of which the depth must be even, two neighbours in depth stay together: panels are [depth / 2, 32, 2].

    >>> to_panels(np.array([[1, 2, 3], [4, 5, 6]], np.float32)).ravel().tolist()
    [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    """
    if weight.itemsize == 2:
        return to_panels(np.ascontiguousarray(weight).view(np.float32)).view(weight.dtype)
    *_, rows, depth = weight.shape
    whole = rows // COLUMNS * COLUMNS
    turned = np.empty_like(weight, order="C")
    matrices = weight.reshape(-1, rows, depth)
    for matrix, out in zip(matrices, turned.reshape(len(matrices), rows * depth), strict=True):
        panels = out[: whole * depth].reshape(-1, depth, COLUMNS)
        panels[...] = matrix[:whole].reshape(-1, COLUMNS, depth).swapaxes(1, 2)
        out[whole * depth :].reshape(depth, -1)[...] = matrix[whole:].T
    return turned
