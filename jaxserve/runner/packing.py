"""Many small int32 arrays in one buffer: a step uploads one array, not ten."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int32

T = TypeVar("T")


class Packing:
    """How a pytree of int32 arrays of fixed shapes lies in one flat buffer.

    >>> packing = Packing({"a": np.zeros((2,), np.int32), "b": np.ones((1, 3), np.int32)})
    >>> packing.pack({"a": np.array([7, 8]), "b": np.array([[1, 2, 3]])})
    array([7, 8, 1, 2, 3], dtype=int32)
    """

    def __init__(self, example: Any) -> None:
        leaves, self._tree = jax.tree.flatten(example)
        self._shapes = [tuple(leaf.shape) for leaf in leaves]
        sizes = [math.prod(shape) for shape in self._shapes]
        self._ends = np.cumsum(sizes).tolist()
        self.size = int(self._ends[-1])

    def pack(self, tree: Any) -> np.ndarray:
        """The leaves of a tree of the same structure, one after the other: i32[size]."""
        leaves = jax.tree.leaves(tree)
        if [np.shape(leaf) for leaf in leaves] != self._shapes:
            raise ValueError(f"packing wants {self._shapes}, got {[np.shape(leaf) for leaf in leaves]}")
        return np.concatenate([np.asarray(leaf, np.int32).reshape(-1) for leaf in leaves])

    def unpack(self, buffer: Int32[Array, " size"]) -> Any:
        """The tree again, as slices of the buffer; inside a jitted function they cost nothing."""
        starts = [0, *self._ends[:-1]]
        leaves = [
            buffer[start:end].reshape(shape) for start, end, shape in zip(starts, self._ends, self._shapes, strict=True)
        ]
        return jax.tree.unflatten(self._tree, leaves)
