"""Many small int32 arrays in one buffer: a step uploads one array, not ten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Int32

T = TypeVar("T")

# Elements between places where an array may start: 256 bytes. XLA may hand a kernel an address in the buffer instead of
# a copy of the slice, and Mosaic GPU compiles kernels for arguments that are aligned to so many bytes.
_ALIGNED = 64


class Packing:
    """How a pytree of int32 arrays of fixed shapes lies in one flat buffer, each array at a multiple of 64 elements.

    >>> packing = Packing({"a": np.zeros((2,), np.int32), "b": np.ones((1, 3), np.int32)})
    >>> packing.pack({"a": np.array([7, 8]), "b": np.array([[1, 2, 3]])})[[0, 1, 64, 65, 66]]
    array([7, 8, 1, 2, 3], dtype=int32)
    """

    def __init__(self, example: Any) -> None:
        leaves, self._tree = jax.tree.flatten(example)
        self._shapes = [tuple(leaf.shape) for leaf in leaves]
        self._places: list[slice] = []
        self.size = 0
        for shape in self._shapes:
            start = -(-self.size // _ALIGNED) * _ALIGNED
            self.size = start + math.prod(shape)
            self._places.append(slice(start, self.size))

    def pack(self, tree: Any) -> np.ndarray:
        """The leaves of a tree of the same structure, in order: i32[size], zeros between them."""
        return self.pack_all([tree])[0]

    def pack_all(self, trees: Sequence[Any]) -> np.ndarray:
        """A row for each of these trees: i32[trees, size]."""
        buffer = np.zeros((len(trees), self.size), np.int32)
        for tree, row in zip(trees, buffer, strict=True):
            leaves = jax.tree.leaves(tree)
            if [leaf.shape for leaf in leaves] != self._shapes:
                raise ValueError(f"packing wants {self._shapes}, got {[leaf.shape for leaf in leaves]}")
            for leaf, place in zip(leaves, self._places, strict=True):
                row[place] = leaf.reshape(-1)
        return buffer

    def unpack(self, buffer: Int32[Array, " size"]) -> Any:
        """The tree again, as slices of the buffer; inside a jitted function they cost little or nothing."""
        leaves = [buffer[place].reshape(shape) for place, shape in zip(self._places, self._shapes, strict=True)]
        return jax.tree.unflatten(self._tree, leaves)
