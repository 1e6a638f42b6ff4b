"""Paged attention in plain XLA, shaped for XLA:CPU: three loops with trip counts of the batch at hand.

Common: the chunks that all rows begin with, walked by all tokens together: a dense product a chunk.
Decode: rows of one token, sorted by length, in groups of DECODE_GROUP; each group walks its rows' keys in chunks.
Prefill: tiles of up to QUERY_TILE tokens of one row, one after the other; each walks its row's keys in chunks.

All keep a running maximum, sum and output (online softmax), so nothing has the size of the context, and no shape
depends on it. A chunk is gathered slot by slot, from slots that are known for the whole step (`slots`): positions that
a row does not see have the slot of the nearest one it sees, so that unwritten slots are never read, and are masked.

What XLA:CPU wants (measured): bfloat16 products that ask for float32 results; keys on the left-hand side, because the
right-hand side is repacked before every product; whole rows of all KV heads in one gather. Heads therefore stay
together: decode queries are spread block-diagonally over the KV heads, which multiplies zeros but copies nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.numerics import MASKED, from_storage
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.xla.plan import CHUNK, DECODE_GROUP, QUERY_TILE, XlaPlan
from pallas_kernels.paged_attention.xla.slots import common_slots, decode_slots, row_slots

_MIN_SHARING = 8  # tokens in a bucket from which a walk over common chunks pays for its code


class _Running(NamedTuple):
    """Online softmax: `out` and `total` are sums of exp(score - top), so that out / total is the answer so far."""

    top: jax.Array  # f32[..., queries]
    total: jax.Array  # f32[..., queries]
    out: jax.Array  # f32[..., queries, width]


class _Scoring(NamedTuple):
    """The settings of a layer; static but for the sinks."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    sinks: jax.Array | None  # f32[q_heads]

    def __call__(self, products: jax.Array) -> jax.Array:
        scores = products * self.scale
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def finish(self, running: _Running, sinks: jax.Array | None) -> jax.Array:
        """The attended values; a sink is one more score in the denominator, without a value."""
        if sinks is None:
            return running.out / running.total[..., None]
        top = jnp.maximum(running.top, sinks)
        decay = jnp.exp(running.top - top)
        return running.out * (decay / (running.total * decay + jnp.exp(sinks - top)))[..., None]

    def first_visible(self, position: jax.Array) -> jax.Array | None:
        """The first position that a query at `position` sees; None: every query sees the first of all."""
        return None if self.sliding_window is None else jnp.maximum(position - (self.sliding_window - 1), 0)

    def visible(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Which of the positions `keys` queries at the positions `queries` see."""
        past = keys <= queries
        return past if self.sliding_window is None else past & (keys > queries - self.sliding_window)


class _Pools(NamedTuple):
    """Both pools as rows of slots; `width` is kv_heads * head_dim."""

    k: jax.Array  # [slots, width]
    v: jax.Array
    block_size: int
    kv_heads: int

    def fetch(self, pool: jax.Array, slots: jax.Array) -> jax.Array:
        """[*slots.shape, width] in the dtype that products are computed in."""
        rows = from_storage(_take(pool, slots))
        return rows.astype(jnp.float32) if rows.dtype == jnp.float16 else rows  # float16 products are slow on CPU


def paged_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k_pool: Shaped[Array, "num_blocks block_size kv_heads head_dim"],
    v_pool: Shaped[Array, "num_blocks block_size kv_heads head_dim"],
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " q_heads"] | None = None,
) -> Float[Array, "tokens q_heads head_dim"]:
    """Attention in q's dtype."""
    plan: XlaPlan = metadata.plan
    block_size, kv_heads, head_dim = k_pool.shape[1:]
    width = kv_heads * head_dim
    pools = _Pools(k_pool.reshape(-1, width), v_pool.reshape(-1, width), block_size, kv_heads)
    scoring = _Scoring(scale, sliding_window, soft_cap, sinks)
    has_tiles = plan.tile_tokens.shape[0] > 0
    # A tile may reach past the last token.
    common = _common(jnp.pad(q, ((0, QUERY_TILE if has_tiles else 0), (0, 0), (0, 0))), pools, metadata, scoring)
    decoded = _decode(q, common, pools, metadata, scoring)
    if has_tiles:
        out = _prefill(q, common, decoded, pools, metadata, scoring)
    else:
        out = jnp.pad(decoded, ((0, 1), (0, 0), (0, 0)))
    return _take(out, plan.output_rows).astype(q.dtype)


class _Common(NamedTuple):
    """All tokens' queries, heads first, and what they saw in the common chunks."""

    q: jax.Array  # [q_heads, tokens, head_dim]
    seen: _Running  # [q_heads, tokens]
    num_chunks: jax.Array | None  # i32[]; None: the program has no such walk


def _common(q: jax.Array, pools: _Pools, metadata: AttentionMetadata, scoring: _Scoring) -> _Common:
    """Walks the chunks that all rows share, each read once for all tokens (cascade inference, Ye et al. 2024).

    They may be a prefix that requests have in common, or what one long prompt has already computed.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = pools.kv_heads
    q = q.swapaxes(0, 1)
    # `out` counts for nothing while `top` is MASKED: any finite values will do, and these are at hand.
    nothing = _Running(*_nothing_seen((heads, tokens), head_dim)[:2], q.astype(jnp.float32))
    if scoring.sliding_window is not None or tokens < _MIN_SHARING:
        return _Common(q, nothing, None)
    num_chunks = metadata.plan.num_common_chunks
    slots_of = common_slots(metadata, block_size=pools.block_size, chunk=CHUNK)
    queries = q.reshape(kv_heads, -1, head_dim)  # [kv_heads, group * tokens, head_dim]

    def step(chunk: jax.Array, running: _Running) -> _Running:
        slots = _slice(slots_of, chunk * CHUNK, CHUNK)
        keys = pools.fetch(pools.k, slots).reshape(-1, kv_heads, head_dim)
        values = pools.fetch(pools.v, slots).reshape(-1, kv_heads, head_dim)
        scores = scoring(_dot(queries.astype(keys.dtype), keys, contract=(2, 2), batch=(0, 1)))
        return _accumulate(running, scores.reshape(heads, tokens, CHUNK), values, value_axes=(0, 1))

    return _Common(q, jax.lax.fori_loop(0, num_chunks, step, nothing), num_chunks)


def _decode(q: jax.Array, common: _Common, pools: _Pools, metadata: AttentionMetadata, scoring: _Scoring) -> jax.Array:
    """f32[decodes, q_heads, head_dim]; anything past num_decodes."""
    plan: XlaPlan = metadata.plan
    q = _take(q, plan.decode_tokens)
    decodes = q.shape[0]
    group = min(DECODE_GROUP, decodes)
    slots_of = decode_slots(metadata, block_size=pools.block_size, chunk=CHUNK, sliding_window=scoring.sliding_window)
    seen = None
    if common.num_chunks is not None:
        seen = _Running(*(_take(x.swapaxes(0, 1), plan.decode_tokens) for x in common.seen))  # [decodes, q_heads]
    if group == decodes:
        return _decode_group(q, seen, common.num_chunks, pools, slots_of, plan.decode_lens, jnp.int32(0), scoring)

    def attend(index: jax.Array, out: jax.Array) -> jax.Array:
        start = index * group
        queries, lens = _slice(q, start, group), _slice(plan.decode_lens, start, group)
        part = None if seen is None else _Running(*(_slice(x, start, group) for x in seen))
        attended = _decode_group(queries, part, common.num_chunks, pools, slots_of, lens, start, scoring)
        return _update(out, attended, start)

    num_groups = jax.lax.div(plan.num_decodes + (group - 1), jnp.int32(group))
    # Zeros would do as well, but XLA lifts constants of all layers to the start of the step and keeps them there.
    return jax.lax.fori_loop(0, num_groups, attend, q.astype(jnp.float32))


def _decode_group(
    q: jax.Array,  # [rows, q_heads, head_dim]
    seen: _Running | None,  # [rows, q_heads], of the common chunks
    num_common: jax.Array | None,  # i32[]
    pools: _Pools,
    slots_of: jax.Array,  # i32[decodes, positions]
    lens: jax.Array,  # i32[rows], falling
    start: jax.Array,  # i32[], the group's first decode row
    scoring: _Scoring,
) -> jax.Array:
    """f32[rows, q_heads, head_dim]; each row walks its own chunks, after those that all tokens walked together."""
    rows, heads, head_dim = q.shape
    spread = _spread_heads(q, pools.kv_heads)

    def step(chunk: jax.Array, running: _Running) -> _Running:
        first = chunk * CHUNK
        slots = _slice(slots_of, (start, first), (rows, CHUNK))
        keys = pools.fetch(pools.k, slots)  # [rows, chunk, width]
        products = _dot(keys, spread.astype(keys.dtype), contract=(2, 2), batch=(0, 0))  # [rows, chunk, q_heads]
        # Without the barrier XLA folds the transpose into the product, which then repacks the keys.
        scores = scoring(jax.lax.optimization_barrier(products).swapaxes(1, 2))
        visible = scoring.visible(lens[:, None] - 1, first + jnp.arange(CHUNK, dtype=jnp.int32))
        scores = jnp.where(visible[:, None], scores, MASKED)
        return _accumulate(running, scores, pools.fetch(pools.v, slots), value_axes=(1, 0))

    shortest = jnp.min(jnp.where(lens > 0, lens, lens[0]))  # padding must not stretch a window to 0
    low, high = _chunk_range(scoring.first_visible(shortest - 1), lens[0], CHUNK)
    low = low if num_common is None else num_common
    running = jax.lax.fori_loop(low, high, step, _nothing_seen((rows, heads), pools.k.shape[1]))
    spread_out = running.out.reshape(rows, pools.kv_heads, -1, pools.kv_heads, head_dim)
    own = [spread_out[:, head, :, head] for head in range(pools.kv_heads)]  # the rest are other heads' values
    alone = running._replace(out=jnp.stack(own, axis=1).reshape(q.shape))
    return scoring.finish(alone if seen is None else _merge(alone, seen), scoring.sinks)


def _merge(a: _Running, b: _Running) -> _Running:
    """Both parts together, by log-sum-exp."""
    top = jnp.maximum(a.top, b.top)
    scale_a, scale_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    out = a.out * scale_a[..., None] + b.out * scale_b[..., None]
    return _Running(top, a.total * scale_a + b.total * scale_b, out)


def _prefill(
    q: jax.Array, common: _Common, decoded: jax.Array, pools: _Pools, metadata: AttentionMetadata, scoring: _Scoring
) -> jax.Array:
    """f32[decodes + 1 + tokens + QUERY_TILE, q_heads, head_dim]: `decoded`, one row of zeros, then each token's result.

    A tile writes QUERY_TILE tokens however many it has: later tiles, whose tokens follow, set right what is theirs.
    """
    plan: XlaPlan = metadata.plan
    slots_of = row_slots(metadata, block_size=pools.block_size, chunk=CHUNK, sliding_window=scoring.sliding_window)

    def attend(tile: jax.Array, out: jax.Array) -> jax.Array:
        token, row, start, length = (
            _scalar(x, tile) for x in (plan.tile_tokens, plan.tile_rows, plan.tile_positions, plan.tile_lens)
        )

        def cut(x: jax.Array) -> jax.Array:  # [q_heads, tokens, ...] -> [q_heads, QUERY_TILE, ...]
            return _slice(x, (jnp.int32(0), token), (x.shape[0], QUERY_TILE))

        seen = _Running(*(cut(x) for x in common.seen))
        tile_of = common._replace(q=cut(common.q), seen=seen)
        attended = _prefill_tile(tile_of, pools, slots_of, row, start, length, scoring)
        return _update(out, attended.swapaxes(0, 1), token + (decoded.shape[0] + 1))

    room = jnp.pad(q.astype(jnp.float32), ((1, QUERY_TILE), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, plan.num_tiles, attend, jnp.concatenate([decoded, room]))


def _prefill_tile(
    tile: _Common,  # of QUERY_TILE tokens
    pools: _Pools,
    slots_of: jax.Array,  # i32[rows, positions]
    row: jax.Array,  # i32[]
    start: jax.Array,  # i32[], position of the first query
    length: jax.Array,  # i32[], queries
    scoring: _Scoring,
) -> jax.Array:
    """f32[q_heads, QUERY_TILE, head_dim]; anything for queries past `length`."""
    heads, _, head_dim = tile.q.shape
    kv_heads = pools.kv_heads
    query_positions = start + jnp.arange(QUERY_TILE, dtype=jnp.int32)
    flat_q = tile.q.reshape(kv_heads, -1, head_dim)  # [kv_heads, group * QUERY_TILE, head_dim]

    def fetch(pool: jax.Array, slots: jax.Array) -> jax.Array:
        return pools.fetch(pool, slots).reshape(-1, kv_heads, head_dim)  # [chunk, kv_heads, head_dim]

    def step(chunk: jax.Array, running: _Running) -> _Running:
        first = chunk * CHUNK
        slots = _slice(slots_of, (row, first), (1, CHUNK))[0]
        keys = fetch(pools.k, slots)
        products = _dot(flat_q.astype(keys.dtype), keys, contract=(2, 2), batch=(0, 1))
        scores = scoring(products.reshape(heads, QUERY_TILE, CHUNK))
        visible = scoring.visible(query_positions[:, None], first + jnp.arange(CHUNK, dtype=jnp.int32))
        scores = jnp.where(visible, scores, MASKED)
        return _accumulate(running, scores, fetch(pools.v, slots), value_axes=(0, 1))

    low, high = _chunk_range(scoring.first_visible(start), start + length, CHUNK)
    low = low if tile.num_chunks is None else tile.num_chunks
    running = jax.lax.fori_loop(low, high, step, tile.seen)
    sinks = None if scoring.sinks is None else scoring.sinks[:, None]  # [q_heads, 1]
    return scoring.finish(running, sinks)


# Indices below are never negative, and say so: XLA would otherwise wrap each of them.


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _scalar(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(x, (index,), (1,), allow_negative_indices=False)[0]


def _slice(x: jax.Array, start: jax.Array | tuple[jax.Array, ...], size: int | tuple[int, ...]) -> jax.Array:
    """`size` elements from `start` on, of the leading axes; of the others all."""
    starts, sizes = (start if isinstance(start, tuple) else (start,)), (size if isinstance(size, tuple) else (size,))
    rest = x.ndim - len(starts)
    starts, sizes = (*starts, *[jnp.int32(0)] * rest), (*sizes, *x.shape[len(sizes) :])
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def _update(x: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    starts = (start, *[jnp.int32(0)] * (x.ndim - 1))
    return jax.lax.dynamic_update_slice(x, rows, starts, allow_negative_indices=False)


def _spread_heads(q: jax.Array, kv_heads: int) -> jax.Array:
    """[rows, q_heads, kv_heads * head_dim]: each query in the columns of its KV head, zeros elsewhere."""
    rows, heads, head_dim = q.shape
    by_head = q.reshape(rows, kv_heads, -1, 1, head_dim)
    own = jnp.eye(kv_heads, dtype=bool)[:, None, :, None]
    return jnp.where(own, by_head, 0).reshape(rows, heads, kv_heads * head_dim)


def _chunk_range(first: jax.Array | None, end: jax.Array, size: int) -> tuple[jax.Array | int, jax.Array]:
    """The chunks that hold the positions [first, end); `size` is a power of two."""
    bits = jnp.int32(size.bit_length() - 1)  # a shift, because a division minds its signs
    lower = 0 if first is None else jax.lax.shift_right_logical(first, bits)
    return lower, jax.lax.shift_right_logical(end + (size - 1), bits)


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
