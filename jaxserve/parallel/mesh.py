"""The device mesh every array lives on, and how an array's logical axes map to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from jaxserve.errors import ConfigError

DATA = "data"  # the mesh axis that requests are split over: each part has slots and a KV pool of its own
TENSOR = "tensor"  # the mesh axis that heads, feed-forward features and the vocabulary are split over

# Logical axis of parameters, KV pools and activations -> mesh axis. An axis that is not named here is replicated.
_MESH_AXIS = {
    "blocks": DATA,
    "kv_heads": TENSOR,
    "q_features": TENSOR,
    "ffn": TENSOR,
    "shards": TENSOR,
    "vocab": TENSOR,
}

EVERYWHERE = PartitionSpec()
PER_DATA_SHARD = PartitionSpec(DATA)

LogicalAxes = tuple[str | None, ...]
Function = Callable[..., Any]
AnyMesh = Mesh | AbstractMesh  # an abstract one has no devices: shapes and shardings alone can be asked of it


def make_mesh(
    tensor_parallel_size: int = 1, *, data_parallel_size: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over the first devices, its axes "data" and "tensor"; neighbours share a layer.

    Without `devices` it takes those of this process, or an equal part of each host's where JAX runs on several.
    """
    size = data_parallel_size * tensor_parallel_size
    given = [list(devices)] if devices is not None else _devices_by_host()
    for rank, own in enumerate(given):
        if len(own) * len(given) < size:
            asked = f"tensor_parallel_size is {tensor_parallel_size}"
            if data_parallel_size > 1:
                asked += f" and data_parallel_size {data_parallel_size}: they take {size} devices"
            if len(given) > 1:
                asked += f", which is {size // len(given)} a host"
            whose = f"{own[0].platform} on node rank {rank}" if len(given) > 1 else own[0].platform
            raise ConfigError(f"{asked}, but {whose} has {len(own)} device(s)")
    chosen = [device for own in given for device in own[: size // len(given)]]
    return Mesh(np.asarray(chosen).reshape(data_parallel_size, tensor_parallel_size), (DATA, TENSOR))


def _devices_by_host() -> list[list[Any]]:
    devices = jax.devices()
    ranks = sorted({device.process_index for device in devices})
    return [[device for device in devices if device.process_index == rank] for rank in ranks]


def device_of(mesh: AnyMesh) -> Any:
    """What a mesh's devices are, which are all of one kind: its first device, or an abstract mesh's abstract one."""
    if isinstance(mesh, AbstractMesh):
        assert mesh.abstract_device is not None
        return mesh.abstract_device
    return mesh.devices.flat[0]


def platform_of(mesh: AnyMesh) -> str:
    """The platform of a mesh's devices: "cpu", "gpu" or "tpu"; an abstract mesh knows it too."""
    return device_of(mesh).platform


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
    """Where an array with these logical axes is split.

    >>> partition_spec(("vocab", None))
    PartitionSpec('tensor', None)
    """
    return PartitionSpec(*(_MESH_AXIS.get(axis) if axis else None for axis in axes))


def sharding(mesh: AnyMesh, axes: LogicalAxes) -> NamedSharding:
    """The sharding of an array with these logical axes on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, EVERYWHERE)


def by_data_shard(mesh: AnyMesh) -> NamedSharding:
    """The sharding of an array whose first axis has the data shards' parts one after the other."""
    return NamedSharding(mesh, PER_DATA_SHARD)


def spans_hosts(mesh: AnyMesh) -> bool:
    """Whether some of a mesh's devices belong to other processes, which hold part of every array that is split."""
    return isinstance(mesh, Mesh) and len({device.process_index for device in mesh.devices.flat}) > 1


def to_devices(
    value: np.ndarray, where: Sharding, *, shape: tuple[int, ...] | None = None, first_row: int = 0
) -> jax.Array:
    """Put an array on its devices; where they are those of several hosts each uploads its own parts, and sends nothing.

    Every host has all of `value`; or, of an array of this `shape`, the rows from `first_row` on that its devices hold.
    """
    if where.is_fully_addressable:
        return jax.device_put(value, where)
    shape = value.shape if shape is None else shape

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "JAX's own type allows it"
        start, stop, _ = index[0].indices(shape[0])
        return value[(slice(start - first_row, stop - first_row), *index[1:])]

    return jax.make_array_from_callback(shape, where, part)


def on_each_data_shard(
    mesh: AnyMesh, function: Function, *, in_specs: tuple[PartitionSpec, ...], out_specs: Any = PER_DATA_SHARD
) -> Function:
    """`function` of one data shard's arrays, made one of all shards' arrays: each runs it, and nothing is sent between.

    Inside, the compiler splits over "tensor" alone; a `jax.shard_map` there names that axis and no mesh.
    """
    if mesh.size == 1:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={DATA}, check_vma=False
    )
