"""Merges the partial results of query tiles whose keys several thread blocks shared."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import DecodePlan, Merge, rows_per_token

LOG2E = math.log2(math.e)


class Partials(NamedTuple):
    """Sums of an online softmax over some of the keys. Slots that no item wrote hold anything."""

    out: jax.Array  # f32[partials, kv_heads, tile rows, head_dim], rows token-major, heads padded to whole tiles
    top: jax.Array  # f32[partials, kv_heads, >= tile rows], the highest score times log2(e)
    total: jax.Array  # f32[partials, kv_heads, >= tile rows], sum of exp2(score - top)


def merge_partials(out: jax.Array, partials: Partials, plan: DecodePlan, sinks: jax.Array | None) -> jax.Array:
    """`out` [tokens, q_heads, head_dim] with the rows of the plan's merges set.

    With weights w_i = exp2(top_i - max top) the merged row is sum(w_i out_i) / sum(w_i total_i); a sink counts once,
    as one more logit without a value. Plain XLA: partials are at most as many as fill the device, so they stay in the
    L2 cache, and one masked product merges them all however many each tile has.
    """
    first, count = plan.merges[:, Merge.FIRST], plan.merges[:, Merge.COUNT]
    index = jnp.arange(plan.num_partials, dtype=jnp.int32)
    belongs = (index >= first[:, None]) & (index < (first + count)[:, None])  # [merges, partials]
    kv_heads, tile_rows, head_dim = partials.out.shape[1:]
    group = out.shape[1] // kv_heads
    token_rows = rows_per_token(group)
    top, total = (x[..., :tile_rows] for x in (partials.top, partials.total))

    mask = belongs[..., None, None]  # [merges, partials, kv_heads, tile_rows]
    highest = jnp.where(mask, top, MASKED).max(axis=1)  # [merges, kv_heads, tile_rows]
    sink = None if sinks is None else sinks_by_row(sinks, kv_heads, tile_rows, token_rows)
    highest = highest if sink is None else jnp.maximum(highest, sink)
    weights = jnp.where(mask, jnp.exp2(top - highest[:, None]), 0.0)
    sums = jnp.where(mask, weights * total, 0.0).sum(axis=1)
    sums = sums if sink is None else sums + jnp.exp2(sink - highest)
    # A merge gives the partials of others a weight of 0, which does not silence a NaN in a row that nobody wrote.
    row_token = jnp.arange(tile_rows, dtype=jnp.int32) // token_rows
    is_written = belongs[..., None] & (row_token < plan.merges[:, Merge.NUM_TOKENS, None, None])
    values = jnp.where(is_written.any(axis=0)[:, None, :, None], partials.out, 0.0)
    merged = jnp.einsum("mpkr,pkrd->mkrd", weights, values, precision=jax.lax.Precision.HIGHEST)
    merged = merged / sums[..., None]

    by_token = merged.reshape(-1, kv_heads, plan.tokens_per_tile, token_rows, head_dim)[..., :group, :]
    by_token = by_token.swapaxes(1, 2).reshape(-1, *out.shape[1:]).astype(out.dtype)  # [merges * tokens_per_tile, ...]
    in_tile = jnp.arange(plan.tokens_per_tile, dtype=jnp.int32)
    tokens = plan.merges[:, Merge.TOKEN, None] + in_tile
    tokens = jnp.where(in_tile < plan.merges[:, Merge.NUM_TOKENS, None], tokens, out.shape[0])
    return out.at[tokens.reshape(-1)].set(by_token, mode="drop")


def sinks_by_row(sinks: jax.Array, kv_heads: int, tile_rows: int, token_rows: int) -> jax.Array:
    """f32[kv_heads, tile_rows]: log2(e) times the sink of each row's head."""
    by_head = sinks.reshape(kv_heads, -1).astype(jnp.float32) * LOG2E
    by_head = jnp.pad(by_head, ((0, 0), (0, token_rows - by_head.shape[1])))
    return jnp.tile(by_head, (1, tile_rows // token_rows))
