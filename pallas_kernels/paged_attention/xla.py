"""Paged attention in plain XLA, shaped for XLA:CPU: two loops with trip counts of the batch at hand.

Decode: rows of one token, sorted by length, in groups of DECODE_GROUP; each group walks its rows' keys in chunks.
Prefill: tiles of up to QUERY_TILE tokens of one row, one after the other; each walks its row's keys in chunks.

Both keep a running maximum, sum and output (online softmax), so nothing has the size of the context, and no shape
depends on it. A chunk is gathered slot by slot: positions outside of what a row may see are clamped to the nearest one
it sees, so that unwritten slots are never read, and then masked.

What XLA:CPU wants (measured): bfloat16 products that ask for float32 results; keys on the left-hand side, because the
right-hand side is repacked before every product; whole rows of all KV heads in one gather. Heads therefore stay
together: decode queries are spread block-diagonally over the KV heads, which multiplies zeros but copies nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import MASKED, from_storage
from pallas_kernels.paged_attention.metadata import DECODE_GROUP, QUERY_TILE, AttentionMetadata

_DECODE_CHUNK = 128  # positions
_PREFILL_CHUNK = 128  # positions


class _Running(NamedTuple):
    """Online softmax: `out` and `total` are sums of exp(score - top), so that out / total is the answer so far."""

    top: jax.Array  # f32[..., queries]
    total: jax.Array  # f32[..., queries]
    out: jax.Array  # f32[..., queries, width]


class _Scoring(NamedTuple):
    """The settings of a layer; static."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None

    def __call__(self, products: jax.Array) -> jax.Array:
        scores = products * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def first_visible(self, positions: jax.Array) -> jax.Array:
        """The first position that queries at `positions` see."""
        if self.sliding_window is None:
            return jnp.zeros_like(positions)
        return jnp.maximum(positions - (self.sliding_window - 1), 0)


class _Pools(NamedTuple):
    """Both pools as rows of slots; `width` is kv_heads * head_dim."""

    k: jax.Array  # [slots, width]
    v: jax.Array
    block_size: int
    kv_heads: int

    def fetch(self, pool: jax.Array, slots: jax.Array) -> jax.Array:
        """[*slots.shape, width] in the dtype that products are computed in."""
        rows = from_storage(pool.at[slots].get(mode="promise_in_bounds", wrap_negative_indices=False))
        return rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows  # float16 products are slow on CPU


def paged_attention_xla(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype."""
    block_size, kv_heads, head_dim = k_pool.shape[1:]
    width = kv_heads * head_dim
    pools = _Pools(k_pool.reshape(-1, width), v_pool.reshape(-1, width), block_size, kv_heads)
    scoring = _Scoring(scale, sliding_window, soft_cap)
    parts = [_decode(q, pools, metadata, scoring), jnp.zeros((1, *q.shape[1:]), jnp.float32)]
    if metadata.tile_tokens.shape[0]:
        parts.append(_prefill(q, pools, metadata, scoring))
    return jnp.concatenate(parts)[metadata.output_rows].astype(q.dtype)


def _decode(q: jax.Array, pools: _Pools, metadata: AttentionMetadata, scoring: _Scoring) -> jax.Array:
    """f32[decodes, q_heads, head_dim]; anything past num_decodes."""
    q = q[metadata.decode_tokens]
    decodes = q.shape[0]
    group = min(DECODE_GROUP, decodes)

    def attend(index: jax.Array, out: jax.Array) -> jax.Array:
        def rows_of(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, index * group, group)

        lens = rows_of(metadata.decode_lens)
        attended = _decode_group(rows_of(q), pools, metadata.block_tables, rows_of(metadata.decode_rows), lens, scoring)
        return jax.lax.dynamic_update_slice_in_dim(out, attended, index * group, 0)

    num_groups = (metadata.num_decodes + (group - 1)) // group
    # Zeros would do as well, but XLA lifts constants of all layers to the start of the step and keeps them there.
    return jax.lax.fori_loop(0, num_groups, attend, q.astype(jnp.float32))


def _decode_group(
    q: jax.Array,  # [rows, q_heads, head_dim]
    pools: _Pools,
    block_tables: jax.Array,
    table_rows: jax.Array,  # i32[rows]
    lens: jax.Array,  # i32[rows]
    scoring: _Scoring,
) -> jax.Array:
    rows, heads, head_dim = q.shape
    spread = _spread_heads(q, pools.kv_heads)
    first, last = scoring.first_visible(lens - 1), jnp.maximum(lens - 1, 0)  # i32[rows]

    def step(chunk: jax.Array, running: _Running) -> _Running:
        positions = chunk * _DECODE_CHUNK + jnp.arange(_DECODE_CHUNK, dtype=jnp.int32)
        seen = jnp.clip(positions, first[:, None], last[:, None])  # i32[rows, chunk]
        slots = _slots(block_tables, table_rows[:, None], seen, pools.block_size)
        keys = pools.fetch(pools.k, slots)  # [rows, chunk, width]
        products = _dot(keys, spread.astype(keys.dtype), contract=(2, 2), batch=(0, 0))  # [rows, chunk, q_heads]
        # Without the barrier XLA folds the transpose into the product, which then repacks the keys.
        scores = scoring(jax.lax.optimization_barrier(products).swapaxes(1, 2))
        scores = jnp.where((positions == seen)[:, None], scores, MASKED)
        return _accumulate(running, scores, pools.fetch(pools.v, slots), value_axes=(1, 0))

    first_of_all = jnp.min(jnp.where(lens > 0, first, jnp.max(first)))  # padding must not stretch a window to 0
    chunks = _chunk_range(first_of_all, jnp.max(last), _DECODE_CHUNK)
    running = jax.lax.fori_loop(*chunks, step, _nothing_seen((rows, heads), pools.k.shape[1]))
    out = running.out / running.total[..., None]  # [rows, q_heads, width]
    out = out.reshape(rows, pools.kv_heads, -1, pools.kv_heads, head_dim)
    own = [out[:, head, :, head] for head in range(pools.kv_heads)]  # the rest are other heads' values
    return jnp.stack(own, axis=1).reshape(q.shape)


def _prefill(q: jax.Array, pools: _Pools, metadata: AttentionMetadata, scoring: _Scoring) -> jax.Array:
    """f32[tokens + QUERY_TILE, q_heads, head_dim]; anything where a token is in no tile.

    A tile writes QUERY_TILE tokens however many it has: later tiles, whose tokens follow, set right what is theirs.
    """
    heads, head_dim = q.shape[1:]
    q = jnp.pad(q, ((0, QUERY_TILE), (0, 0), (0, 0)))  # a tile may reach past the last token

    def attend(tile: jax.Array, out: jax.Array) -> jax.Array:
        token = metadata.tile_tokens[tile]
        queries = jax.lax.dynamic_slice_in_dim(q, token, QUERY_TILE)
        queries = queries.reshape(QUERY_TILE, pools.kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        start = metadata.tile_positions[tile]
        end = start + metadata.tile_lens[tile]
        attended = _prefill_tile(queries, pools, metadata.block_tables[metadata.tile_rows[tile]], start, end, scoring)
        attended = attended.transpose(2, 0, 1, 3).reshape(QUERY_TILE, heads, head_dim)
        return jax.lax.dynamic_update_slice_in_dim(out, attended, token, 0)

    return jax.lax.fori_loop(0, metadata.num_tiles, attend, q.astype(jnp.float32))


def _prefill_tile(
    q: jax.Array,  # [kv_heads, group, QUERY_TILE, head_dim]
    pools: _Pools,
    block_table: jax.Array,  # i32[blocks_per_seq]
    start: jax.Array,  # i32[], position of the first query
    end: jax.Array,  # i32[], position after the last query
    scoring: _Scoring,
) -> jax.Array:
    """f32[kv_heads, group, QUERY_TILE, head_dim]; queries past `end` get what the last position gives them."""
    kv_heads, group, _, head_dim = q.shape
    query_positions = jnp.minimum(start + jnp.arange(QUERY_TILE, dtype=jnp.int32), end - 1)
    first = scoring.first_visible(query_positions)  # i32[QUERY_TILE]
    flat_q = q.reshape(kv_heads, group * QUERY_TILE, head_dim)

    def fetch(pool: jax.Array, slots: jax.Array) -> jax.Array:
        return pools.fetch(pool, slots).reshape(-1, kv_heads, head_dim)  # [chunk, kv_heads, head_dim]

    def step(chunk: jax.Array, running: _Running) -> _Running:
        positions = chunk * _PREFILL_CHUNK + jnp.arange(_PREFILL_CHUNK, dtype=jnp.int32)
        seen = jnp.clip(positions, first[0], end - 1)
        slots = _slots(block_table[None], jnp.zeros((), jnp.int32), seen, pools.block_size)
        keys = fetch(pools.k, slots)
        products = _dot(flat_q.astype(keys.dtype), keys, contract=(2, 2), batch=(0, 1))
        scores = scoring(products.reshape(kv_heads * group, QUERY_TILE, _PREFILL_CHUNK))
        visible = (positions <= query_positions[:, None]) & (positions >= first[:, None])
        scores = jnp.where(visible, scores, MASKED)
        return _accumulate(running, scores, fetch(pools.v, slots), value_axes=(0, 1))

    chunks = _chunk_range(first[0], end - 1, _PREFILL_CHUNK)
    running = jax.lax.fori_loop(*chunks, step, _nothing_seen((kv_heads * group, QUERY_TILE), head_dim))
    return (running.out / running.total[..., None]).reshape(q.shape)


def _slots(block_tables: jax.Array, rows: jax.Array, positions: jax.Array, block_size: int) -> jax.Array:
    """Where `positions` of table rows `rows` lie in the flattened pool."""
    blocks = block_tables.at[rows, positions // block_size].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return blocks * block_size + positions % block_size


def _spread_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[rows, q_heads, kv_heads * head_dim]: each query in the columns of its KV head, zeros elsewhere."""
    rows, heads, head_dim = q.shape
    by_head = q.reshape(rows, kv_heads, -1, 1, head_dim)
    own = jnp.eye(kv_heads, dtype=bool)[:, None, :, None]
    return jnp.where(own, by_head, 0).reshape(rows, heads, kv_heads * head_dim)


def _chunk_range(first: jax.Array, last: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    return first // size, last // size + 1


def _nothing_seen(queries: tuple[int, ...], width: int) -> _Running:
    return _Running(
        jnp.full(queries, MASKED, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros((*queries, width), jnp.float32),
    )


def _accumulate(running: _Running, scores: jax.Array, values: jax.Array, *, value_axes: tuple[int, int]) -> _Running:
    """Adds a chunk; `value_axes` are the position and the batch axis of `values`.

    Weights of a chunk that is masked altogether vanish once a visible score raises `top`.
    """
    position_axis, batch_axis = value_axes
    top = jnp.maximum(running.top, scores.max(-1))
    decay = jnp.exp(running.top - top)
    weights = jnp.exp(scores - top[..., None]).astype(values.dtype)  # rounded before they are summed: one pass less
    total = running.total * decay + weights.astype(jnp.float32).sum(-1)
    by_value = weights.reshape(values.shape[batch_axis], -1, weights.shape[-1])
    out = _dot(by_value, values, contract=(2, position_axis), batch=(0, batch_axis)).reshape(running.out.shape)
    return _Running(top, total, running.out * decay[..., None] + out)


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int], batch: tuple[int, int]) -> jax.Array:
    """float32 out: products that asked for bfloat16 would leave XLA:CPU's fast path.

    Axes are named here instead of moved before: XLA would fold the move into a product it then widens to float32.
    """
    dimensions: Any = (((contract[0],), (contract[1],)), ((batch[0],), (batch[1],)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
