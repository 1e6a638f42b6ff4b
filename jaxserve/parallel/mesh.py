"""The device mesh every array lives on, and how a parameter's logical axes map to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.errors import ConfigError

TENSOR = "tensor"  # the mesh axis that heads, feed-forward features and the vocabulary are split over

# Logical axis -> mesh axis. An axis that is not named here is replicated.
_MESH_AXIS = {"kv_heads": TENSOR, "q_features": TENSOR, "ffn": TENSOR, "shards": TENSOR, "vocab": TENSOR}

LogicalAxes = tuple[str | None, ...]


def make_mesh(tensor_parallel_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first `tensor_parallel_size` devices, one axis named "tensor"."""
    devices = jax.devices() if devices is None else devices
    if len(devices) < tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size is {tensor_parallel_size}, but {devices[0].platform} has {len(devices)} device(s)"
        )
    return Mesh(np.asarray(devices[:tensor_parallel_size]), (TENSOR,))


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
    """Where an array with these logical axes is split.

    >>> partition_spec(("vocab", None))
    PartitionSpec('tensor', None)
    """
    return PartitionSpec(*(_MESH_AXIS.get(axis) if axis else None for axis in axes))


def sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """The sharding of an array with these logical axes on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
