"""Contract of paged_attention: causal attention of a ragged batch of queries over paged keys and values."""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.implementations import implementation_of
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.pools import check_pools


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap"), inline=True)
def paged_attention(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # as pools.pool_shape_of has it
    v_pool: jax.Array,  # as k_pool
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype; zeros for padding tokens.

    The implementation is the one that planned the batch (`metadata.implementation`). The keys and values of this
    step's tokens are already in the pools (kv_write). A query at position p sees the positions
    max(0, p - sliding_window + 1)..p of its own sequence. Its scores are the products times `scale`, which `soft_cap`
    squashes to soft_cap * tanh(scores / soft_cap). `sinks` add exp(sink) to each softmax's denominator, after the soft
    cap (attention sinks, Xiao et al. 2024, as gpt-oss learns them). Slots that no query sees may hold anything, NaN
    included.
    """
    _check(q, k_pool, v_pool, metadata, scale, sliding_window, soft_cap, sinks)
    return implementation_of(metadata.implementation).paged_attention(
        q,
        k_pool,
        v_pool,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )


def _check(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: jax.Array | None,
) -> None:
    geometry = metadata.geometry
    check_pools(k_pool, v_pool, metadata.implementation, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim)
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating [tokens, q_heads, head_dim], got {q.dtype}{list(q.shape)}")
    if q.shape[1:] != (geometry.q_heads, geometry.head_dim):
        raise ValueError(
            f"metadata was built for {geometry.q_heads} query heads of {geometry.head_dim}, "
            f"q has {q.shape[1]} of {q.shape[2]}"
        )
    if k_pool.shape[1] != geometry.block_size:
        raise ValueError(f"metadata was built for blocks of {geometry.block_size}, the pools have {k_pool.shape[1]}")
    if metadata.num_tokens != q.shape[0]:
        raise ValueError(f"metadata was built for {metadata.num_tokens} tokens, q has {q.shape[0]}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token or None, got {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {soft_cap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.dtype != jnp.float32):
        raise ValueError(f"sinks must be float32[{q.shape[1]}] or None, got {sinks.dtype}{list(sinks.shape)}")
