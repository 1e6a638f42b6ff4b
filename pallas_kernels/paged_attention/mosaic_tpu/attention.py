"""Paged attention on TPU: a kernel for the decodes of a step, and the same one for its query tiles."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.mosaic_tpu.layout import (
    pool_shape,
    queries_to_lanes,
    results_from_lanes,
)
from pallas_kernels.paged_attention.mosaic_tpu.plan import TpuPlan
from pallas_kernels.paged_attention.mosaic_tpu.ragged import attend
from pallas_kernels.paged_attention.mosaic_tpu.settings import Settings, vmem_bytes
from pallas_kernels.paged_attention.mosaic_tpu.tiles import (
    VMEM_BYTES,
    heuristic_decode_tiles,
    heuristic_prefill_tiles,
    layout_of,
)

DTYPES = ("bfloat16", "float32")


def check_supported(geometry: AttentionGeometry) -> None:
    """NotImplementedError, with what there is instead, for a geometry that the kernel cannot compute."""
    if geometry.dtype not in DTYPES:
        raise NotImplementedError(f"dtype {geometry.dtype}; the TPU kernel takes {' and '.join(DTYPES)}")
    if geometry.block_size % 16 or geometry.block_size > 256:
        raise NotImplementedError(f"blocks of {geometry.block_size}; the TPU kernel takes multiples of 16 up to 256")
    if geometry.head_dim % 8 or geometry.head_dim > 256:
        raise NotImplementedError(f"head_dim {geometry.head_dim}; the TPU kernel takes multiples of 8 up to 256")
    for tiles in (heuristic_decode_tiles(geometry), heuristic_prefill_tiles(geometry)):
        settings = Settings(
            layout=layout_of(geometry), tiles=tiles, block_size=geometry.block_size, dtype=geometry.dtype
        )
        if vmem_bytes(settings) > VMEM_BYTES:
            raise NotImplementedError(
                f"{geometry.q_heads} query and {geometry.kv_heads} KV heads of {geometry.head_dim} take "
                f"{vmem_bytes(settings) >> 20} MiB of VMEM of {VMEM_BYTES >> 20}; split the heads over more devices"
            )


def paged_attention(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # [num_blocks, block_size, lanes], see layout.py
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
    interpret: Any = False,  # as pallas_call takes it: True, or pltpu.InterpretParams
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype; see op.py."""
    plan: TpuPlan = metadata.plan
    geometry, layout = plan.geometry, layout_of(plan.geometry)
    _check(q, k_pool, metadata, geometry)
    num_tokens = q.shape[0]
    lane_q = queries_to_lanes(q, layout)
    if plan.tiles is not None:  # a kernel copies whole query tiles where it can, and they must exist
        lane_q = jnp.pad(lane_q, ((0, max(0, plan.sizes.prefill.query_tile - num_tokens)), (0, 0), (0, 0)))
    no_sinks = jnp.full(layout.q_rows, MASKED, jnp.float32)
    lane_sinks = no_sinks if sinks is None else no_sinks.at[: layout.q_heads].set(sinks)
    out = jnp.zeros_like(lane_q)
    for tiles, work in ((plan.sizes.decode, plan.decodes), (plan.sizes.prefill, plan.tiles)):
        if work is None:
            continue
        settings = Settings(
            layout=layout,
            tiles=tiles,
            block_size=geometry.block_size,
            dtype=geometry.dtype,
            blocks_per_seq=metadata.block_tables.shape[1],
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
        )
        out = attend(
            lane_q,
            k_pool,
            v_pool,
            lane_sinks,
            metadata.block_tables,
            work,
            out,
            settings=settings,
            interpret=interpret,
        )
    return results_from_lanes(out[:num_tokens], layout)


def _check(q: jax.Array, k_pool: jax.Array, metadata: AttentionMetadata, geometry: AttentionGeometry) -> None:
    check_supported(geometry)
    wanted = pool_shape(k_pool.shape[0], geometry.block_size, geometry.kv_heads, geometry.head_dim)
    if k_pool.shape != wanted:
        raise ValueError(f"the TPU kernel reads pools {wanted} (mosaic_tpu.pool_shape), got {k_pool.shape}")
    if q.dtype != geometry.dtype or k_pool.dtype != geometry.dtype:
        raise NotImplementedError(
            f"q {q.dtype} and pools {k_pool.dtype}; the TPU kernel was planned for {geometry.dtype} in both"
        )
