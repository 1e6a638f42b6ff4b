"""Prefill on Hopper GPUs: causal attention of rows of many query tokens over paged keys and values.

The structure of FlashAttention-3 (Shah et al. 2024; `jax/experimental/pallas/ops/gpu/attention_mgpu.py` shows it in
Pallas), over blocks. Grid (items of the plan, groups of query heads); a thread block is three warpgroups:

    producer    block table -> TMA, one copy a block and head -> ring of K tiles, ring of V tiles
    compute 0   64 rows: the item's first tokens  x folded heads    S = Q K^T, online softmax, O += P V
    compute 1   64 rows: the item's other tokens  x folded heads    the same K and V tiles

A tile of queries lies head by head (row = head * tokens + token), so that TMA takes it from q as it is, one box a head,
and any number of query heads a KV head fits without padding (`folded_heads`). The two compute warpgroups take turns
at the tensor cores: one multiplies while the other is at its softmax. Memory traffic: q and out once; the K and V of
a KV head once for each item and group of heads, mostly out of the L2 cache.

On an H100 the 48 cases of 2026-11-26 were right, and a prompt of 8192 tokens took 527 TFLOP/s, tiles of 64 keys longer
(docs/results/nvidia-h100-80gb-hbm3). The kernel is as it was then; cases that came since have run on no GPU
(docs/gpu-check.md). Not tried there: the registers (232 and 40 spill), the kernel without turns (`_take_turn`),
`folded_heads` of groups such as 5. ptxas of CUDA 12.8.0 to 12.9.0 miscompiles causal masks, so `check_supported` passes
them over, as jax's own kernel does.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_operand
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import (
    COMPUTE_WARPGROUPS,
    PrefillPlan,
    check_prefill_supported,
    folded_heads,
    tokens_per_item,
)
from pallas_kernels.paged_attention.mosaic_gpu.prefill_refs import Global, Item, Shared
from pallas_kernels.paged_attention.mosaic_gpu.product import ROWS, Warpgroup, with_more_rows
from pallas_kernels.paged_attention.mosaic_gpu.tiles import PrefillTiles, heuristic_prefill_tiles

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # where the largest score starts: finite, so that a row of masked scores (-inf) only is no nan
_COMPUTE_REGISTERS, _PRODUCER_REGISTERS = 224, 56  # a thread; 128 * (2 * 224 + 56) of the SM's 65536
_ALIGNED = 64  # elements of 16 bits: TMA wants 128-byte aligned rows in shared memory


def prefill(
    q: jax.Array,  # [tokens, q_heads, head_dim], bf16 or f16
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim], as q
    v_pool: jax.Array,
    out: jax.Array,  # [tokens, q_heads, head_dim], as q
    block_tables: jax.Array,  # i32[rows, blocks_per_seq]
    kv_lens: jax.Array,  # i32[rows]
    plan: PrefillPlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
    tiles: PrefillTiles | None = None,
    interpret: Any = None,  # compat.gpu_interpret_params(): run on the CPU
) -> jax.Array:
    """Returns `out` with the tokens of the plan's items replaced by their attention; donated, it changes in place.

    Arguments mean what they mean in `paged_attention.op`. Registers hold f32 scores and sums; the weights are rounded
    to q's dtype before they meet V. NotImplementedError for geometries that `check_prefill_supported` refuses.
    """
    num_items = plan.rows.shape[0]
    _, block_size, kv_heads, head_dim = k_pool.shape
    geometry = AttentionGeometry(
        q_heads=q.shape[1], kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=q.dtype.name
    )
    check_prefill_supported(geometry)
    tiles = tiles or heuristic_prefill_tiles(head_dim)
    kernel = _Prefill(
        geometry=geometry,
        tiles=tiles,
        blocks_per_seq=block_tables.shape[1],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        product=Warpgroup(interpret=bool(interpret)),
    )
    num_tokens, item_tokens = len(q), tokens_per_item(geometry.group)
    # Copies through swizzled tiles see whole tiles of 8 tokens only. Past the end TMA reads zeros, and the interpreter
    # nothing at all.
    spare = item_tokens if interpret or num_tokens < item_tokens else 0
    q, out = with_more_rows(q, -num_tokens % 8 + spare), with_more_rows(out, -num_tokens % 8)
    operands = [q, k_pool, v_pool, block_tables, kv_lens, *jax.tree.leaves(plan), *([] if sinks is None else [sinks])]
    out_ref: Any = jax.new_ref(out, memory_space=plgpu.GMEM)
    mesh = plgpu.Mesh(
        grid=(num_items, geometry.q_heads // kernel.heads),
        grid_names=("item", "heads"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
    )
    call: Any = pl.kernel(
        kernel.body,
        out_type=(),
        mesh=mesh,
        # Under Warpgroup semantics, the default of 0.11, the layout inference of 0.11.2 fails on this kernel.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name="paged_prefill",
    )
    call(*(gpu_operand(x, interpret=interpret) for x in operands), out_ref)
    return jax.freeze(out_ref)[:num_tokens]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Prefill:
    """The kernel of one geometry."""

    geometry: AttentionGeometry
    tiles: PrefillTiles
    blocks_per_seq: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool
    product: Warpgroup

    @property
    def heads(self) -> int:
        """Query heads in a tile of queries."""
        return folded_heads(self.geometry.group)

    @property
    def tokens(self) -> int:
        """Tokens in a tile of queries, a power of two."""
        return ROWS // self.heads

    @property
    def box(self) -> int:
        """Keys that one copy brings: they lie in one block and in one tile."""
        return math.gcd(self.geometry.block_size, self.tiles.block_kv)

    def body(self, *refs: Any) -> None:
        """One thread of one thread block; refs as `Global`, without sinks where there are none."""
        g = Global._make((*refs[:10], refs[10] if self.has_sinks else None, refs[-1]))

        def allocated(queries: Any, *shared: Any) -> None:
            q, rows_out = queries
            self._item(g, Shared._make((q, rows_out, *shared)))

        pl.run_scoped(allocated, *self._scratch(), collective_axes="warpgroup")

    def _scratch(self) -> list[Any]:
        head_dim, dtype = self.geometry.head_dim, jnp.dtype(self.geometry.dtype)
        q = self.product.tile((ROWS, head_dim), dtype, stages=COMPUTE_WARPGROUPS)
        rows_out = plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, -(-head_dim // _ALIGNED) * _ALIGNED), dtype)
        # Results take the place of the queries, each warpgroup's of its own: only where both have the same size. Not in
        # the interpreter, whose unions are whole: one warpgroup may store its result while the other has its queries.
        aliased = head_dim % _ALIGNED == 0 and not self.product.interpret
        ring = self.product.tile((self.tiles.block_kv, head_dim), dtype, stages=self.tiles.stages)
        copies = self.tiles.block_kv // self.box
        stages = self.tiles.stages
        full = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
        free = plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE_WARPGROUPS)
        return [
            plgpu.RefUnion(q, rows_out) if aliased else [q, rows_out],
            ring,
            ring,
            plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS, num_arrivals=self.heads),
            full,
            full,
            free,
            free,
            plgpu.Barrier(num_barriers=1, num_arrivals=copies),
            plgpu.Barrier(num_barriers=1, num_arrivals=COMPUTE_WARPGROUPS),
        ]

    def _item(self, g: Global, s: Shared) -> None:
        # Each branch works out all that it needs by itself: what lived across both would be spilled, since the
        # compiler has as few registers for it as the producer has.
        @pl.when(lax.axis_index("warpgroup") < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            item = self._read_item(g)

            @pl.when(item.num_tokens > 0)
            def _() -> None:
                result = self._compute(g, s, item)
                self._store(g, s, self._read_item(g), result)

        @pl.when(lax.axis_index("warpgroup") == COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            item = self._read_item(g)

            @pl.when(item.num_tokens > 0)
            def _() -> None:
                self._produce(g, s, item)

    def _read_item(self, g: Global) -> Item:
        """The thread block's item. Each call reads it anew, so that no register holds it from one to the next."""
        block_kv = jnp.int32(self.tiles.block_kv)
        index, heads = lax.optimization_barrier((lax.axis_index("item"), lax.axis_index("heads")))
        row, num_tokens = g.rows[index], g.num_tokens[index]
        first_position, computed = g.first_positions[index], g.computed_lens[index]
        first_head = heads * self.heads
        window = self.sliding_window
        lowest = 0 if window is None else jnp.maximum(first_position - window + 1, 0)
        first_tile = lax.div(jnp.int32(lowest), block_kv)
        return Item(
            row=row,
            first_token=g.first_tokens[index],
            num_before=jnp.maximum(computed - first_position, 0),
            num_tokens=num_tokens,
            first_position=first_position,
            first_readable=0 if window is None else jnp.maximum(computed - window + 1, 0),
            kv_len=g.kv_lens[row],
            first_tile=first_tile,
            num_tiles=lax.div(first_position + num_tokens + block_kv - 1, block_kv) - first_tile,
            first_head=first_head,
            kv_head=lax.div(first_head, jnp.int32(self.geometry.group)),
        )

    # The producer.

    def _produce(self, g: Global, s: Shared, item: Item) -> None:
        stages = self.tiles.stages

        @pl.loop(0, item.num_tiles)
        def _(step: jax.Array) -> None:
            slot = lax.rem(step, jnp.int32(stages))
            start = (item.first_tile + step) * self.tiles.block_kv
            places = self._places(g, item, start)  # before the wait: the table's latency hides in it

            def copy(pool: Any, tile: Any, arrived: Any) -> None:
                for index, (block, offset) in enumerate(places):
                    source = pool.at[block, pl.ds(offset, self.box), item.kv_head]
                    plgpu.copy_gmem_to_smem(source, tile.at[slot, pl.ds(index * self.box, self.box)], arrived)

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(s.k_free.at[slot])

            copy(g.k_pool, s.k, s.k_full.at[slot])

            @pl.when(step >= stages)
            def _() -> None:
                plgpu.barrier_wait(s.v_free.at[slot])

            is_partial = (start < item.first_readable) | (start + self.tiles.block_kv > item.kv_len)

            @pl.when(jnp.logical_not(is_partial))
            def _() -> None:
                copy(g.v_pool, s.v, s.v_full.at[slot])

            @pl.when(is_partial)
            def _() -> None:
                copy(g.v_pool, s.v, s.v_partial.at[0])
                plgpu.barrier_wait(s.v_partial.at[0])
                self._zero_unread(s.v.at[slot], item, start)
                for _ in places:
                    plgpu.barrier_arrive(s.v_full.at[slot])

        @pl.loop(jnp.maximum(item.num_tiles - stages, 0), item.num_tiles)
        def _(step: jax.Array) -> None:  # the interpreter insists that every phase of a barrier is seen
            slot = lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(s.k_free.at[slot])
            plgpu.barrier_wait(s.v_free.at[slot])

    def _places(self, g: Global, item: Item, start: jax.Array) -> list[tuple[jax.Array, Any]]:
        """Block and offset in it of each copy of the tile at `start`; past the table's end, those of its last block."""
        block_size = self.geometry.block_size
        places = []
        for index in range(self.tiles.block_kv // self.box):
            position = start + index * self.box
            entry = jnp.minimum(lax.div(position, jnp.int32(block_size)), self.blocks_per_seq - 1)
            offset = 0 if self.box == block_size else lax.rem(position, jnp.int32(block_size))
            places.append((g.block_tables[item.row, entry], offset))
        return places

    def _zero_unread(self, tile: Any, item: Item, start: jax.Array) -> None:
        """Zeroes the rows of a tile of V that no query may see: there might be nan, and 0 * nan is nan."""
        columns = math.gcd(self.geometry.head_dim, _ALIGNED)  # few: the producer has few registers
        for first in range(0, self.tiles.block_kv, ROWS):
            position = start + first + self.product.iota((ROWS, columns), 0)
            readable = (position >= item.first_readable) & (position < item.kv_len)
            for column in range(0, self.geometry.head_dim, columns):
                part = tile.at[pl.ds(first, ROWS), pl.ds(column, columns)]
                values = self.product.load(part)
                part[...] = jnp.where(readable, values, jnp.zeros_like(values))
        plgpu.commit_smem()

    # The compute warpgroups.

    def _compute(self, g: Global, s: Shared, item: Item) -> jax.Array:
        """The attention of this warpgroup's queries, [ROWS, head_dim] in q's dtype."""
        warpgroup = lax.axis_index("warpgroup")
        first_token = item.first_token + warpgroup * self.tokens
        for head in range(self.heads):
            plgpu.copy_gmem_to_smem(
                g.q.at[pl.ds(first_token, self.tokens), item.first_head + head],
                s.q.at[warpgroup, pl.ds(head * self.tokens, self.tokens)],
                s.q_full.at[warpgroup],
            )
        plgpu.barrier_wait(s.q_full.at[warpgroup])
        plgpu.barrier_wait(s.k_full.at[0])

        @pl.when(warpgroup == 1)
        def _() -> None:
            _take_turn(s)

        carry: Any = self._start(g, item)
        position = item.first_position + warpgroup * self.tokens
        ahead = position - item.first_tile * self.tiles.block_kv  # of the first query, of the first key
        for first, last, masked in self._ranges(item, position):
            carry = lax.fori_loop(first, last, self._step(s, item.num_tiles, warpgroup, ahead, masked), carry)

        @pl.when(warpgroup == 0)
        def _() -> None:
            _take_turn(s)

        acc, _, total = carry
        result: jax.Array = acc * self.product.over_columns(1.0 / total, self.geometry.head_dim)
        return result.astype(self.geometry.dtype)

    def _start(self, g: Global, item: Item) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weighted values, largest score and sum of weights before the first tile: a sink is a score without value."""
        acc = self.product.full((ROWS, self.geometry.head_dim), 0.0)
        if g.sinks is None:
            return acc, self.product.full_rows(ROWS, _LOWEST), self.product.full_rows(ROWS, 0.0)
        head = self.product.iota((ROWS, 8), 0) // self.tokens
        sinks = self.product.full((ROWS, 8), 0.0)
        for index in range(self.heads):
            sinks = jnp.where(head == index, g.sinks[item.first_head + index] * _LOG2E, sinks)
        return acc, sinks.max(axis=1), self.product.full_rows(ROWS, 1.0)

    def _ranges(self, item: Item, position: jax.Array) -> list[tuple[Any, Any, bool]]:
        """The steps of a warpgroup whose first query is at `position`: [first, last), and whether masks are needed."""
        block_kv = jnp.int32(self.tiles.block_kv)
        causal_edge = jnp.minimum(lax.div(position + 1, block_kv) - item.first_tile, item.num_tiles)
        if self.sliding_window is None:
            return [(0, causal_edge, False), (causal_edge, item.num_tiles, True)]
        lowest = jnp.maximum(position + self.tokens - self.sliding_window, 0)  # that the last query sees
        window_edge = jnp.minimum(lax.div(lowest + block_kv - 1, block_kv) - item.first_tile, item.num_tiles)
        causal_edge = jnp.maximum(causal_edge, window_edge)
        return [(0, window_edge, True), (window_edge, causal_edge, False), (causal_edge, item.num_tiles, True)]

    def _step(
        self, s: Shared, num_tiles: jax.Array, warpgroup: jax.Array, ahead: jax.Array, masked: bool
    ) -> Callable[..., Any]:
        def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            acc, top, total = carry
            slot = lax.rem(index, jnp.int32(self.tiles.stages))
            own = lax.optimization_barrier(warpgroup)  # else a descriptor for each product is held all the while
            scores = self.product.scores(s.q.at[own], s.k.at[slot], lambda: _take_turn(s))
            plgpu.barrier_arrive(s.k_free.at[slot])
            visible = self._visible(ahead - index * self.tiles.block_kv) if masked else None
            weights, top, shrink = self._softmax(scores, top, visible)
            acc = acc * self.product.over_columns(shrink, self.geometry.head_dim)
            total = total * shrink
            rounded = weights.astype(self.geometry.dtype)
            is_small = self.geometry.head_dim <= 128
            if is_small:
                total = total + weights.sum(axis=1)
                acc, total, top, rounded = lax.optimization_barrier((acc, total, top, rounded))
            plgpu.barrier_arrive(s.turns.at[0])  # the softmax is done
            plgpu.barrier_wait(s.v_full.at[slot])
            plgpu.barrier_wait(s.turns.at[0])  # the tensor cores are free
            if not is_small:
                total = total + weights.sum(axis=1)

            def await_next_keys() -> None:
                @pl.when(index + 1 < num_tiles)
                def _() -> None:
                    plgpu.barrier_wait(s.k_full.at[lax.rem(index + 1, jnp.int32(self.tiles.stages))])

            acc = self.product.add_product(acc, rounded, s.v.at[slot], await_next_keys)
            plgpu.barrier_arrive(s.v_free.at[slot])
            return acc, top, total

        return step

    def _visible(self, ahead: jax.Array) -> jax.Array:
        """bool[ROWS, block_kv]: which keys of a tile each row's query sees; the first is `ahead` of the first key."""
        shape = (ROWS, self.tiles.block_kv)
        query = self.product.iota(shape, 0) & (self.tokens - 1)
        distance = query - self.product.iota(shape, 1) + ahead
        visible = distance >= 0
        return visible if self.sliding_window is None else visible & (distance < self.sliding_window)

    def _softmax(
        self, scores: jax.Array, top: jax.Array, visible: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Weights of the scores against the new largest score; that one, in base 2; and what older sums shrink by."""
        unit = self.scale * _LOG2E
        if self.soft_cap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x): the device's own tanh has 11 bits
            scores = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2.0 * unit / self.soft_cap)))
            unit = self.soft_cap * _LOG2E
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * unit)  # the largest before it is scaled: scales are positive
        weights = jnp.exp2(scores * unit - self.product.over_columns(new_top, scores.shape[1]))
        return weights, new_top, jnp.exp2(top - new_top)

    # Results.

    def _store(self, g: Global, s: Shared, item: Item, result: jax.Array) -> None:
        """Writes the warpgroup's tokens of the item, and no other: whole tiles at once, the others row by row."""
        warpgroup = lax.axis_index("warpgroup")
        first_token = item.first_token + warpgroup * self.tokens
        first, end = (
            jnp.clip(bound - warpgroup * self.tokens, 0, self.tokens) for bound in (item.num_before, item.num_tokens)
        )
        is_whole = end - first == self.tokens

        @pl.when(is_whole)
        def _() -> None:
            tile = s.q.at[warpgroup]
            tile[...] = result
            plgpu.commit_smem()
            for head in range(self.heads):
                plgpu.copy_smem_to_gmem(
                    tile.at[pl.ds(head * self.tokens, self.tokens)],
                    g.out.at[pl.ds(first_token, self.tokens), item.first_head + head],
                )

        @pl.when(jnp.logical_not(is_whole))
        def _() -> None:
            rows = s.rows_out.at[warpgroup]
            self.product.store_slowly(rows.at[:, pl.ds(0, self.geometry.head_dim)], result)
            plgpu.commit_smem()

            @pl.loop(first, end)
            def _(token: jax.Array) -> None:
                for head in range(self.heads):
                    plgpu.copy_smem_to_gmem(
                        rows.at[head * self.tokens + token, pl.ds(0, self.geometry.head_dim)],
                        g.out.at[first_token + token, item.first_head + head],
                    )

        plgpu.wait_smem_to_gmem(0)


def _take_turn(s: Shared) -> None:
    plgpu.barrier_arrive(s.turns.at[0])
    plgpu.barrier_wait(s.turns.at[0])
