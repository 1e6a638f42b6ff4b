"""Contract of paged_attention: causal attention of a ragged batch of queries over paged keys and values."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.kv_write.op import check_pools
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.xla import paged_attention_xla

_KERNELS: Mapping[Implementation, Callable[..., Any]] = {"xla": paged_attention_xla}


@functools.partial(jax.jit, static_argnames=("scale", "sliding_window", "soft_cap", "implementation"), inline=True)
def paged_attention(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,  # as k_pool
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype; zeros for padding tokens.

    The keys and values of this step's tokens are already in the pools (kv_write). A query at position p sees the
    positions max(0, p - sliding_window + 1)..p of its own sequence. `soft_cap` squashes the scaled scores to
    soft_cap * tanh(scores / soft_cap). Slots that no query sees may hold anything, NaN included.
    """
    _check(q, k_pool, v_pool, metadata, sliding_window, soft_cap)
    return dispatch(
        "paged_attention",
        _KERNELS,
        implementation,
        q,
        k_pool,
        v_pool,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def _check(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    check_pools(k_pool, v_pool)
    if q.ndim != 3 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating [tokens, q_heads, head_dim], got {q.dtype}{list(q.shape)}")
    kv_heads, head_dim = k_pool.shape[2:]
    if q.shape[2] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads of {q.shape[2]}, the pools {kv_heads} of {head_dim}; "
            "head_dim must be equal and q_heads a multiple of kv_heads"
        )
    if metadata.output_rows.shape != q.shape[:1]:
        raise ValueError(f"metadata was built for {metadata.output_rows.shape[0]} tokens, q has {q.shape[0]}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 token or None, got {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {soft_cap}")
