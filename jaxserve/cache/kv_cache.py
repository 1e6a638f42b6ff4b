"""The paged KV cache on the devices: its layout, how many blocks fit, and its arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxserve.errors import ConfigError
from jaxserve.parallel.mesh import DATA, AnyMesh, partition_spec, platform_of
from pallas_kernels.dispatch import Implementation
from pallas_kernels.numerics import POOL_HEAD_AXIS, pool_dtype
from pallas_kernels.pools import pool_shape_of

LayerCache = tuple[jax.Array, jax.Array]  # one layer's K pool and V pool, in the attention backend's layout

RESERVED_BLOCKS = 1  # block 0 takes the writes of padding rows


def pool_partition_spec(block_axis: str | None = "blocks") -> PartitionSpec:
    """How a pool is split over the mesh: by block, for each data shard has a pool, and by KV head.

    With `block_axis=None`: how one data shard's pool is split.
    """
    return partition_spec((block_axis, *[None] * (POOL_HEAD_AXIS - 1), "kv_heads"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """Sizes of the cache, all layers alike; the attention implementation decides the layout of a pool.

    Each data shard of a mesh has a pool, with blocks of its own that it numbers from 0; block counts are those of one.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: DTypeLike
    implementation: Implementation = "xla"
    num_shards: int = 1  # devices that the KV heads are split over
    beside_bytes: int = 0  # that another model's K and V take under the same block id, on all devices together

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, K and V of all layers and what lies beside, on all devices of its data shard together."""
        values = 2 * math.prod(self.layer_shape(1))  # with whatever the layout pads
        return self.num_layers * values * jnp.dtype(self.dtype).itemsize + self.beside_bytes

    def num_blocks_in(self, num_bytes: int) -> int:
        """Blocks that fit `num_bytes`; `ConfigError` if that is not even one to use."""
        num_blocks = num_bytes // self.block_bytes
        if num_blocks <= RESERVED_BLOCKS:
            raise ConfigError(
                f"{num_bytes / 2**20:.0f} MiB hold {num_blocks} KV blocks of {self.block_bytes / 2**20:.2f} MiB, at "
                f"least {RESERVED_BLOCKS + 1} are needed; raise kv_cache_memory_bytes or gpu_memory_utilization"
            )
        return int(num_blocks)

    def layer_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's K (or V) pool, of all devices of a data shard together."""
        shape = list(
            pool_shape_of(
                self.implementation,
                num_blocks=num_blocks,
                block_size=self.block_size,
                kv_heads=self.num_kv_heads // self.num_shards,
                head_dim=self.head_dim,
            )
        )
        shape[POOL_HEAD_AXIS] *= self.num_shards
        return tuple(shape)

    def abstract(self, num_blocks: int, mesh: AnyMesh) -> list[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """Shapes, dtypes and shardings of the arrays that `allocate` makes."""
        one = jax.ShapeDtypeStruct(
            self.layer_shape(num_blocks * mesh.shape[DATA]),
            pool_dtype(self.dtype, platform_of(mesh)),
            sharding=NamedSharding(mesh, pool_partition_spec()),
        )
        return [(one, one)] * self.num_layers

    def allocate(self, num_blocks: int, mesh: Mesh) -> list[LayerCache]:
        """Zeroed pools of all layers and data shards, split over the mesh."""
        pools = self.abstract(num_blocks, mesh)
        one, _ = pools[0]  # all are alike, so one small program makes them
        zeros = jax.jit(lambda: jnp.zeros(one.shape, one.dtype), out_shardings=one.sharding)
        return [(zeros(), zeros()) for _ in pools]
