"""What the threads of the GPU prefill kernel share: the names of its refs and of the numbers of its work item."""

from typing import Any, NamedTuple


class Global(NamedTuple):
    """Refs in global memory."""

    q: Any
    k_pool: Any
    v_pool: Any
    block_tables: Any
    kv_lens: Any
    rows: Any
    first_tokens: Any
    num_tokens: Any
    first_positions: Any
    computed_lens: Any
    sinks: Any
    out: Any


class Shared(NamedTuple):
    """Refs in shared memory; `full` barriers: a tile has arrived, `free`: both compute warpgroups are done with it."""

    q: Any  # [warpgroups, ROWS, head_dim], as wgmma reads it
    rows_out: Any  # [warpgroups, ROWS, head_dim up to _ALIGNED], row by row
    k: Any  # [stages, block_kv, head_dim]
    v: Any
    q_full: Any  # [warpgroups]
    k_full: Any  # [stages]
    v_full: Any
    k_free: Any
    v_free: Any
    v_partial: Any  # a tile of V with slots that must be zeroed first
    turns: Any


class Item(NamedTuple):
    """What a thread block computes; i32 scalars."""

    row: Any
    first_token: Any  # a multiple of 8
    num_before: Any  # tokens at the item's beginning that are of the row before
    num_tokens: Any  # those included
    first_position: Any
    first_readable: Any  # slots of the row before this position may hold anything,
    kv_len: Any  # and from this one on
    first_tile: Any  # of keys, counted from the beginning of the sequence
    num_tiles: Any
    first_head: Any
    kv_head: Any
