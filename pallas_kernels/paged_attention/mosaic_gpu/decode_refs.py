"""What the parts of the decode kernel hand each other: a work's scalars, running sums, references to memory."""

from typing import Any, NamedTuple

import jax


class Work(NamedTuple):
    """An item and a KV head; scalars."""

    turn: jax.Array  # of the thread block: how many works it did before
    head: jax.Array
    row: jax.Array
    token: jax.Array
    num_tokens: jax.Array
    position: jax.Array
    kv_lo: jax.Array
    kv_hi: jax.Array
    partial: jax.Array


class KeyRange(NamedTuple):
    """The tiles of keys that an item walks; scalars."""

    first_seen: jax.Array  # position of the first key that a query of the item sees
    first: jax.Array  # tile
    num_tiles: jax.Array


class Softmax(NamedTuple):
    """Running sums of an online softmax, in registers."""

    acc: jax.Array  # f32[ROWS, head_dim]
    top: jax.Array  # f32[ROWS], the highest score so far, times log2(e)
    total: jax.Array  # f32[ROWS], sum of exp2(score - top)


class Operands(NamedTuple):
    """Refs in global memory."""

    q: Any  # [tokens * kv_heads * rows_between_heads, head_dim], and rows that nobody uses
    k: Any  # [num_blocks, block_size, kv_heads, head_dim]
    v: Any
    block_tables: Any  # i32[rows, blocks_per_seq]
    items: Any  # i32[items, 8]
    sinks: Any  # f32[kv_heads, ROWS], log2(e) times the sink of each row's head
    out: Any  # [tokens * q_heads, head_dim]
    partial_out: Any  # f32[partials, kv_heads, tile rows, head_dim]
    partial_log_weight: Any  # f32[partials, kv_heads, ROWS]


class Shared(NamedTuple):
    """Refs in shared memory: tiles and the barriers that say who may touch them."""

    q: Any  # [query_stages, ROWS, head_dim]
    k: Any  # [stages, kv_tile, head_dim]
    v: Any
    results: Any  # [ROWS, head_dim], in f32 and in the output's dtype
    log_weight: Any  # f32[ROWS]
    q_arrived: Any  # [query_stages]
    k_arrived: Any  # [stages]
    v_arrived: Any
    q_free: Any
    k_free: Any
    v_free: Any
