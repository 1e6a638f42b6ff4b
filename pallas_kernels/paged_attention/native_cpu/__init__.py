"""Paged attention on CPUs, in C++ (pallas_kernels/native/src/attention.cc)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.numerics import logical_dtype
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.metadata import AttentionMetadata

__all__ = ["build_plan", "check_supported", "paged_attention", "plan_shapes"]

LANES = 16  # of the widest vectors; a head is a whole number of vectors
DTYPES = ("float32", "bfloat16")


def check_supported(geometry: AttentionGeometry) -> None:
    """NotImplementedError names what the kernel cannot do, or why this machine cannot have it."""
    _check_dtype(geometry.dtype)
    if geometry.head_dim % LANES:
        raise NotImplementedError(f"head_dim must be a multiple of {LANES}, got {geometry.head_dim}")
    try:
        native.load()
    except native.UnavailableError as error:
        raise NotImplementedError(str(error)) from error


def plan_shapes(**_: Any) -> tuple[()]:
    """Nothing is planned ahead: the kernel shares out rows and heads as they come."""
    return ()


def build_plan(*_: np.ndarray, **__: Any) -> tuple[()]:
    """See `plan_shapes`."""
    return ()


def paged_attention(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype. Products are those of the pools' dtype, sums float32."""
    _check_dtype(logical_dtype(k_pool.dtype).name)
    out = native.call(
        "paged_attention",
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        q.astype(jnp.float32),
        k_pool,
        v_pool,
        jnp.asarray(metadata.query_starts),
        jnp.asarray(metadata.kv_lens),
        jnp.asarray(metadata.block_tables),
        jnp.zeros(0, jnp.float32) if sinks is None else sinks,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap or 0.0),
        window=np.int64(sliding_window or 0),
    )
    return out.astype(q.dtype)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise NotImplementedError(f"pools are {' or '.join(DTYPES)}, not {dtype}")
