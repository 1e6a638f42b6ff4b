"""Shares of models that the TPU kernels must compile for, and the layer step that is compiled: write, then attend."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_write.mosaic_tpu import kv_write_mosaic_tpu
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.metadata import AttentionMetadata, metadata_shapes
from pallas_kernels.paged_attention.mosaic_tpu.attention import paged_attention
from pallas_kernels.paged_attention.mosaic_tpu.layout import pool_shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """What one device of a model holds, and a bucket."""

    name: str
    geometry: AttentionGeometry
    num_tokens: int = 256
    num_rows: int = 256
    context: int = 2048  # tokens that a block table holds
    num_blocks: int = 1024
    has_prefill: bool = False
    soft_cap: float | None = None
    has_sinks: bool = False

    def arguments(self) -> tuple[Any, ...]:
        """ShapeDtypeStructs for `layer_step`; the pools are arguments 3 and 4."""
        geometry, dtype = self.geometry, jnp.dtype(self.geometry.dtype)
        q = jax.ShapeDtypeStruct((self.num_tokens, geometry.q_heads, geometry.head_dim), dtype)
        kv = jax.ShapeDtypeStruct((self.num_tokens, geometry.kv_heads, geometry.head_dim), dtype)
        shape = pool_shape(self.num_blocks, geometry.block_size, geometry.kv_heads, geometry.head_dim)
        pool = jax.ShapeDtypeStruct(shape, dtype)
        metadata = metadata_shapes(
            geometry=geometry,
            implementation="mosaic_tpu",
            num_tokens=self.num_tokens,
            num_rows=self.num_rows,
            blocks_per_seq=self.context // geometry.block_size,
            has_prefill=self.has_prefill,
        )
        return q, kv, kv, pool, pool, jax.ShapeDtypeStruct((self.num_tokens,), jnp.int32), metadata

    def layer_step(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_pool: jax.Array,
        v_pool: jax.Array,
        slots: jax.Array,
        metadata: AttentionMetadata,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of one layer, and its pools: donate arguments 3 and 4, and nothing as large may be copied."""
        k_pool, v_pool = kv_write_mosaic_tpu(k, v, k_pool, v_pool, slots)
        out = paged_attention(
            q,
            k_pool,
            v_pool,
            metadata,
            scale=self.geometry.head_dim**-0.5,
            sliding_window=self.geometry.sliding_windows[0],
            soft_cap=self.soft_cap,
            sinks=jnp.zeros(self.geometry.q_heads, jnp.float32) if self.has_sinks else None,
        )
        return out, k_pool, v_pool


def _geometry(q_heads: int, kv_heads: int, head_dim: int = 128, **changes: Any) -> AttentionGeometry:
    sizes = {"block_size": 128, "dtype": "bfloat16"} | changes
    return AttentionGeometry(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, **sizes)


_LLAMA_8B = _geometry(32, 8)
_PREFILL = {"num_tokens": 2048, "num_rows": 64, "has_prefill": True}

COMPILE_CASES: tuple[CompileCase, ...] = (
    CompileCase(name="llama_8b_decode", geometry=_LLAMA_8B),
    CompileCase(name="llama_8b_prefill", geometry=_LLAMA_8B, **_PREFILL),
    CompileCase(name="llama_8b_on_4_decode", geometry=_geometry(8, 2)),
    CompileCase(name="llama_8b_on_4_prefill", geometry=_geometry(8, 2), **_PREFILL),
    CompileCase(name="llama_70b_on_8_decode", geometry=_geometry(8, 1)),
    CompileCase(name="llama_70b_on_8_prefill", geometry=_geometry(8, 1), **_PREFILL),
    CompileCase(name="smollm2_decode", geometry=_geometry(9, 3, 64, block_size=32)),
    CompileCase(name="smollm2_prefill", geometry=_geometry(9, 3, 64, block_size=32), **_PREFILL),
    CompileCase(name="small_bucket", geometry=_geometry(32, 8, block_size=16), num_tokens=8, num_rows=8),
    CompileCase(
        name="window_soft_cap_and_sinks",
        geometry=_geometry(16, 8, 256, block_size=64, sliding_windows=(1024,)),
        num_tokens=512,
        num_rows=32,
        has_prefill=True,
        soft_cap=50.0,
        has_sinks=True,
    ),
    CompileCase(name="multi_head_of_80", geometry=_geometry(32, 32, 80, block_size=32), **_PREFILL),
    CompileCase(name="float32", geometry=_geometry(32, 8, dtype="float32"), **_PREFILL),
)
