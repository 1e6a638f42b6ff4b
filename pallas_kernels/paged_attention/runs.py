"""Batches of equal rows in chains of calls: what attention is timed with, on a device or compiled ahead of time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.numerics import pool_dtype
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.implementations import implementation_of
from pallas_kernels.paged_attention.metadata import AttentionMetadata, build_metadata
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.pools import pool_shape_of

_CHAIN = 8  # decodes a program, at least: a launch is then a small part of each
_MAX_SETS = 64
COLD_BYTES = 128 << 20  # of keys and values between two reads of the same: an H100's L2 cache has 50 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRun:
    """A batch of equal rows, `sets` times over in blocks of their own, so that no keys are still in a cache."""

    geometry: AttentionGeometry
    implementation: Implementation
    rows: int
    query_len: int  # new tokens of each row
    kv_len: int
    has_prefill: bool  # as the engine plans every step; without it, rows of one token alone
    cold_bytes: int = COLD_BYTES

    @property
    def kv_bytes(self) -> int:
        """Keys and values that one call reads."""
        slots = self.rows * self.kv_len
        return 2 * slots * self.geometry.kv_heads * self.geometry.head_dim * self._itemsize

    @property
    def io_bytes(self) -> int:
        """Keys, values, queries and results of one call."""
        tokens = self.rows * self.query_len
        return self.kv_bytes + 2 * tokens * self.geometry.q_heads * self.geometry.head_dim * self._itemsize

    @property
    def flops(self) -> int:
        """Of the products, for the pairs of a query and a key that it sees."""
        first = self.kv_len - self.query_len + 1
        pairs = self.rows * self.query_len * (first + self.kv_len) // 2
        return 4 * pairs * self.geometry.q_heads * self.geometry.head_dim

    @property
    def sets(self) -> int:
        """So many that `cold_bytes` are read between two reads of the same keys; prefill does not wait for memory."""
        return min(_MAX_SETS, max(1, math.ceil(self.cold_bytes / self.kv_bytes))) if self.query_len == 1 else 1

    @property
    def length(self) -> int:
        """Calls in the chain."""
        return max(_CHAIN, self.sets) if self.query_len == 1 else 2

    def batches(self, tiles: Any = None) -> list[AttentionMetadata]:
        """One a set, NumPy leaves; `tiles` instead of those that the plan would choose."""
        per_row = -(-self.kv_len // self.geometry.block_size)
        ids = 1 + np.random.default_rng(0).permutation(self.sets * self.rows * per_row).astype(np.int32)
        lens = np.full(self.rows, self.query_len, np.int32), np.full(self.rows, self.kv_len, np.int32)
        return [
            planned(
                *lens,
                tables,
                implementation=self.implementation,
                tiles=tiles,
                geometry=self.geometry,
                num_tokens=self.rows * self.query_len,
                num_rows=self.rows,
                has_prefill=self.has_prefill,
            )
            for tables in ids.reshape(self.sets, self.rows, per_row)
        ]

    @property
    def pool(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of K's pool, and of V's."""
        shape = pool_shape_of(
            self.implementation,
            num_blocks=1 + self.sets * self.rows * -(-self.kv_len // self.geometry.block_size),
            block_size=self.geometry.block_size,
            kv_heads=self.geometry.kv_heads,
            head_dim=self.geometry.head_dim,
        )
        return jax.ShapeDtypeStruct(shape, pool_dtype(self.geometry.dtype, jax.default_backend()))

    @property
    def queries(self) -> jax.ShapeDtypeStruct:
        """[tokens, q_heads, head_dim]."""
        shape = (self.rows * self.query_len, self.geometry.q_heads, self.geometry.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.geometry.dtype))

    def operands(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random queries and pools, made on the device."""
        make = jax.jit(partial(jax.random.normal, dtype=self.geometry.dtype), static_argnames="shape")
        shapes = (self.queries.shape, self.pool.shape, self.pool.shape)
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (make(key, shape=shape) for key, shape in zip(keys, shapes, strict=True))
        return q, k.view(self.pool.dtype), v.view(self.pool.dtype)

    def chain(self, length: int, attend: Callable[..., jax.Array] = paged_attention) -> Any:
        """A jitted function (q, k_pool, v_pool, batches) of `length` calls; each result is the next one's queries."""
        call = jax.jit(partial(attend, scale=self.geometry.head_dim**-0.5))  # traced and lowered once

        def run(q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, batches: list[AttentionMetadata]) -> jax.Array:
            for index in range(length):
                q = call(q, k_pool, v_pool, batches[index % len(batches)])
            return q

        return jax.jit(run)

    @property
    def _itemsize(self) -> int:
        return jnp.dtype(self.geometry.dtype).itemsize


def planned(
    query_lens: np.ndarray,
    kv_lens: np.ndarray,
    block_tables: np.ndarray,
    *,
    implementation: Implementation,
    tiles: Any,
    **bucket: Any,
) -> AttentionMetadata:
    """`build_metadata` with a plan for the given tiles; None: those that the plan would choose."""
    metadata = build_metadata(query_lens, kv_lens, block_tables, implementation=implementation, **bucket)
    if tiles is None:
        return metadata
    build_plan = implementation_of(implementation).build_plan
    plan = build_plan(query_lens, kv_lens, block_tables, blocks_per_seq=block_tables.shape[1], tiles=tiles, **bucket)
    return replace(metadata, plan=plan)
