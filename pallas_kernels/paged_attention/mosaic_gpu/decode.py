"""Paged attention for few query tokens a row on NVIDIA Hopper (Pallas Mosaic GPU): split over keys, TMA and wgmma.

On an H100 the 48 cases of 2026-11-26 were right, and from 32 rows of 1024 keys on it read at 83 to 99 % of the rate at
which the device copies (docs/results/nvidia-h100-80gb-hbm3): wgmma and its layouts, swizzled copies, the order of
stores and products. What came since has run on no GPU (docs/gpu-check.md): the length of the work list in each item,
tiles of 2 to 7 tokens in steps of so few, rows of more than 16 tokens, partial results and their weights behind one
fence, and the cases for these. A run on the CPU checks their values with plain dots (see product.py), and that nothing
races.
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

from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import DecodePlan, Item, rows_between_heads, rows_per_token
from pallas_kernels.paged_attention.mosaic_gpu.decode_refs import KeyRange, Operands, Shared, Softmax, Work
from pallas_kernels.paged_attention.mosaic_gpu.merge import LOG2E, Partials, merge_partials, sinks_by_row
from pallas_kernels.paged_attention.mosaic_gpu.product import ROWS, Warpgroup, with_more_rows
from pallas_kernels.paged_attention.mosaic_gpu.tiles import DecodeTiles, heuristic_decode_tiles

# Layouts are given by hand: the other semantics, default since JAX 0.11, infer them and find none here. No row is
# spread over warps, so reductions need no shared memory; at head_dim 256 the default is what would not fit.
_COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
)

_ZEROED_COLUMNS = 64  # of V, at a time: beside an accumulator of 256 columns there are few registers


def paged_decode(
    q: jax.Array,  # [tokens, q_heads, head_dim], bf16 or f16
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim], q's dtype
    v_pool: jax.Array,  # as k_pool
    block_tables: jax.Array,  # i32[rows, blocks_per_seq]
    plan: DecodePlan,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
    tiles: DecodeTiles | None = None,
    interpret: Any = None,  # compat.gpu_interpret_params(): run on the CPU
) -> jax.Array:
    """Attention of the plan's query tiles: [tokens, q_heads, head_dim] in q's dtype.

    Tokens that no item of the plan covers get anything.

    Grid (multiprocessors). Each thread block takes items x KV heads in turn, longest first, heads of an item side by
    side, since their keys lie side by side in a block. One warpgroup copies and one computes; they share a ring of
    tiles of K and V that runs on across items, so that keys of the next are on their way when an item ends.

        copies     q  K0 V0 K1 V1 | q  K0 V0 ...      one TMA a block of the pool; waits until a stage is free
        computes      S0 = q K0'  P0 V0 | S1 ...      online softmax in base 2 (Milakov and Gimelshein 2018)

    HBM: each key and value of an item once, its queries once; out, the result, or for tiles of several items a
    float32 partial, merged afterwards by log-sum-exp (flash decoding, Dao et al. 2023).
    """
    kv_heads, head_dim = k_pool.shape[2:]
    kernel = _Decode(
        wg=Warpgroup(interpret=bool(interpret)),
        tiles=tiles or heuristic_decode_tiles(head_dim),
        group=q.shape[1] // kv_heads,
        tokens_per_tile=plan.tokens_per_tile,
        num_partials=plan.num_partials,
        num_blocks=min(plan.num_sms, plan.items.shape[0] * kv_heads),
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=k_pool.shape[1],
        blocks_per_seq=block_tables.shape[1],
        dtype=q.dtype,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
    )
    out, partials = kernel(q, k_pool, v_pool, block_tables, plan, sinks, interpret)
    if partials is None:
        return out
    return merge_partials(out, partials, plan, sinks, interpret=interpret)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Decode:
    """The kernel: what is known when it compiles, and the parts of its body."""

    wg: Warpgroup
    tiles: DecodeTiles
    group: int
    tokens_per_tile: int
    num_partials: int
    num_blocks: int  # thread blocks
    kv_heads: int
    head_dim: int
    block_size: int
    blocks_per_seq: int
    dtype: Any
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool

    @property
    def token_rows(self) -> int:
        return rows_per_token(self.group)

    @property
    def head_rows(self) -> int:
        return rows_between_heads(self.group)

    @property
    def copies_per_tile(self) -> int:
        return max(self.tiles.kv_tile // self.block_size, 1)

    def __call__(
        self,
        q: jax.Array,
        k_pool: jax.Array,
        v_pool: jax.Array,
        block_tables: jax.Array,
        plan: DecodePlan,
        sinks: jax.Array | None,
        interpret: Any,
    ) -> tuple[jax.Array, Partials | None]:
        if self.head_rows > self.group:
            q_by_head = q.reshape(-1, self.kv_heads, self.group, self.head_dim)
            rows = jnp.pad(q_by_head, ((0, 0), (0, 0), (0, self.head_rows - self.group), (0, 0)))
        else:
            rows = q
        rows = rows.reshape(-1, self.head_dim)
        # Copies through swizzled tiles see whole tiles of 8 rows only; the interpreter knows no copies past the end.
        rows = with_more_rows(rows, -len(rows) % 8 + (self.token_rows if self.wg.interpret else 0))
        operands = [rows, k_pool, v_pool, block_tables, plan.items]
        if sinks is not None:
            operands.append(sinks_by_row(sinks, self.kv_heads, ROWS, self.token_rows))
        results = plgpu.kernel(
            self._body,
            out_type=self._results(q.shape[0] * q.shape[1]),
            scratch_types=self._scratch(),
            grid=(self.num_blocks,),
            grid_names=("block",),
            num_threads=2,
            thread_name="warpgroup",
            compiler_params=_COMPILER_PARAMS,
            interpret=interpret,
        )(*operands)
        out = results[0].reshape(q.shape)
        return out, Partials(*results[1:]) if self.num_partials else None

    def _results(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        results = [jax.ShapeDtypeStruct((rows, self.head_dim), self.dtype)]
        if self.num_partials:
            each = (self.num_partials, self.kv_heads)
            tile_rows = self.tokens_per_tile * self.token_rows
            results.append(jax.ShapeDtypeStruct((*each, tile_rows, self.head_dim), jnp.float32))
            results.append(jax.ShapeDtypeStruct((*each, ROWS), jnp.float32))
        return results

    def _scratch(self) -> list[Any]:
        stages = self.tiles.stages
        keys = self.wg.tile((self.tiles.kv_tile, self.head_dim), self.dtype, stages=stages)
        result = (ROWS, self.head_dim)
        arrived = plgpu.Barrier(num_barriers=stages, num_arrivals=self.copies_per_tile)
        free = plgpu.Barrier(num_barriers=stages)
        return [
            self.wg.tile(result, self.dtype, stages=self.tiles.query_stages),
            keys,
            keys,
            self.wg.either(plgpu.SMEM(result, jnp.float32), plgpu.SMEM(result, self.dtype)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_barriers=self.tiles.query_stages, num_arrivals=self.tokens_per_tile),
            arrived,
            arrived,
            plgpu.Barrier(num_barriers=self.tiles.query_stages),
            free,
            free,
        ]

    def _body(self, *refs: Any) -> None:
        inputs, refs = refs[: 5 + self.has_sinks], refs[5 + self.has_sinks :]
        results, scratch = refs[: 3 if self.num_partials else 1], refs[3 if self.num_partials else 1 :]
        given = (*inputs, *[None] * (6 - len(inputs)), *results, *[None] * (3 - len(results)))
        operands, shared = Operands(*given), Shared(*scratch)
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        num_items = operands.items[lax.div(block, jnp.int32(self.kv_heads)), Item.NUM_ITEMS]  # beside its first item
        num_works = num_items * self.kv_heads
        rounds = lax.div(num_works - block + jnp.int32(self.num_blocks - 1), jnp.int32(self.num_blocks))

        def work_of(turn: jax.Array) -> Work:
            index = block + turn * self.num_blocks
            item, head = lax.div(index, jnp.int32(self.kv_heads)), lax.rem(index, jnp.int32(self.kv_heads))
            return Work(turn, head, *(operands.items[item, column] for column in Item if column != Item.NUM_ITEMS))

        @pl.when(warpgroup == 0)
        def _() -> None:
            lax.fori_loop(
                0, rounds, lambda turn, step: self._compute(operands, shared, work_of(turn), step), jnp.int32(0)
            )
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _() -> None:
            steps = lax.fori_loop(
                0, rounds, lambda turn, step: self._load(operands, shared, work_of(turn), step), jnp.int32(0)
            )
            self._drain(shared, rounds, steps)

    def _range(self, work: Work) -> KeyRange:
        tile = self.tiles.kv_tile
        first_seen = jnp.int32(0)
        if self.sliding_window is not None:
            first_seen = jnp.maximum(work.position - jnp.int32(self.sliding_window - 1), 0)
        first = lax.div(jnp.maximum(work.kv_lo, first_seen), jnp.int32(tile))
        end = lax.div(work.kv_hi + jnp.int32(tile - 1), jnp.int32(tile))
        return KeyRange(first_seen, first, jnp.maximum(end - first, 0))

    # ---- the warpgroup that copies ----

    def _load(self, operands: Operands, shared: Shared, work: Work, step: jax.Array) -> jax.Array:
        """Starts all copies of a work; `step` tiles went through the ring before, the result with this work's."""
        keys = self._range(work)
        self._load_queries(operands, shared, work)

        def load(index: jax.Array, blocks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            self._load_tile(operands, shared, work, blocks, keys.first + index, step + index)
            return self._blocks(operands, work, keys.first + index + 1)  # early, off the path to the next copy

        lax.fori_loop(0, keys.num_tiles, load, self._blocks(operands, work, keys.first))
        return step + keys.num_tiles

    def _load_queries(self, operands: Operands, shared: Shared, work: Work) -> None:
        """Each token's heads, with the rows that follow up to whole swizzle tiles, which nobody uses.

        Rows of a product are independent: what the rest of the tile holds, NaN included, meets no row that is stored.
        A tile short of tokens takes its last one again, so that each barrier sees as many arrivals.
        """
        stage = lax.rem(work.turn, jnp.int32(self.tiles.query_stages))
        pl.when(work.turn >= self.tiles.query_stages)(lambda: plgpu.barrier_wait(shared.q_free.at[stage]))
        for index in range(self.tokens_per_tile):
            token = jnp.minimum(index, work.num_tokens - 1)
            plgpu.copy_gmem_to_smem(
                operands.q.at[pl.ds(self._row(work, token, self.head_rows), self.token_rows)],
                shared.q.at[stage, pl.ds(index * self.token_rows, self.token_rows)],
                shared.q_arrived.at[stage],
            )

    def _row(self, work: Work, index: jax.Array | int, head_rows: int) -> jax.Array:
        """Of a token's first query head, where each KV head has `head_rows`."""
        return ((work.token + index) * self.kv_heads + work.head) * head_rows

    def _load_tile(
        self,
        operands: Operands,
        shared: Shared,
        work: Work,
        blocks: tuple[jax.Array, ...],
        tile: jax.Array,
        step: jax.Array,
    ) -> None:
        rows = min(self.block_size, self.tiles.kv_tile)
        stage = lax.rem(step, jnp.int32(self.tiles.stages))
        offset = lax.rem(tile * jnp.int32(self.tiles.kv_tile), jnp.int32(self.block_size)) if len(blocks) == 1 else 0
        ring = (
            (operands.k, shared.k, shared.k_arrived, shared.k_free),
            (operands.v, shared.v, shared.v_arrived, shared.v_free),
        )
        for pool, tiles, arrived, free in ring:
            pl.when(step >= self.tiles.stages)(lambda free=free: plgpu.barrier_wait(free.at[stage]))
            for index, block in enumerate(blocks):
                source = pool.at[block, pl.ds(offset, rows), work.head]
                plgpu.copy_gmem_to_smem(source, tiles.at[stage, pl.ds(index * rows, rows)], arrived.at[stage])

    def _drain(self, shared: Shared, turns: jax.Array, steps: jax.Array) -> None:
        """Waits until every stage is free, so that no barrier ends with an arrival that nobody saw."""
        for frees, used in (((shared.q_free,), turns), ((shared.k_free, shared.v_free), steps)):
            for free in frees:
                for stage in range(free.shape[0]):
                    pl.when(stage < used)(lambda free=free, stage=stage: plgpu.barrier_wait(free.at[stage]))

    def _blocks(self, operands: Operands, work: Work, tile: jax.Array) -> tuple[jax.Array, ...]:
        """Ids of the blocks of a tile of keys. Past the table's end its last entry again: those keys are masked."""
        first = lax.div(tile * jnp.int32(self.tiles.kv_tile), jnp.int32(self.block_size))
        last = jnp.int32(self.blocks_per_seq - 1)
        return tuple(
            operands.block_tables[work.row, jnp.minimum(first + index, last)] for index in range(self.copies_per_tile)
        )

    # ---- the warpgroup that computes ----

    def _compute(self, operands: Operands, shared: Shared, work: Work, step: jax.Array) -> jax.Array:
        """Computes a work and starts the copies of its result; `step` as in `_load`."""
        wg, keys = self.wg, self._range(work)
        stage = lax.rem(work.turn, jnp.int32(self.tiles.query_stages))
        nothing = Softmax(wg.full((ROWS, self.head_dim), 0.0), wg.full_rows(ROWS, MASKED), wg.full_rows(ROWS, 0.0))

        def attend(index: jax.Array, softmax: Softmax) -> Softmax:
            start = (keys.first + index) * jnp.int32(self.tiles.kv_tile)
            return self._attend(shared, shared.q.at[stage], work, keys, start, step + index, softmax)

        plgpu.barrier_wait(shared.q_arrived.at[stage])
        softmax = lax.fori_loop(0, keys.num_tiles, attend, nothing)
        plgpu.barrier_arrive(shared.q_free.at[stage])
        plgpu.wait_smem_to_gmem(0)  # the previous result has left shared memory
        if self.num_partials:
            is_whole = work.partial == self.num_partials
            pl.when(is_whole)(lambda: self._store(operands, shared, work, softmax))
            pl.when(~is_whole)(lambda: self._store_partial(operands, shared, work, softmax))
        else:
            self._store(operands, shared, work, softmax)
        return step + keys.num_tiles

    def _attend(
        self,
        shared: Shared,
        queries: Any,  # [ROWS, head_dim] in shared memory
        work: Work,
        keys: KeyRange,
        start: jax.Array,
        step: jax.Array,
        softmax: Softmax,
    ) -> Softmax:
        """Adds the tile of keys that begins at position `start`."""
        wg, kv_tile = self.wg, self.tiles.kv_tile
        stage = lax.rem(step, jnp.int32(self.tiles.stages))
        plgpu.barrier_wait(shared.k_arrived.at[stage])
        scores = wg.scores(queries, shared.k.at[stage])
        plgpu.barrier_arrive(shared.k_free.at[stage])
        scores = jnp.where(self._visible(work, keys, start), self._scaled(scores), MASKED)
        top = jnp.maximum(softmax.top, scores.max(axis=1))
        decay = jnp.exp2(softmax.top - top)
        weights = jnp.exp2(scores - wg.over_columns(top, kv_tile))
        total = softmax.total * decay + weights.sum(axis=1)
        rounded = weights.astype(self.dtype)  # before the wait, which frees registers
        acc = softmax.acc * wg.over_columns(decay, self.head_dim)
        plgpu.barrier_wait(shared.v_arrived.at[stage])
        self._zero_unseen_values(shared.v.at[stage], work, keys, start)
        acc = wg.add_product(acc, rounded, shared.v.at[stage])
        plgpu.barrier_arrive(shared.v_free.at[stage])
        return Softmax(acc, top, total)

    def _scaled(self, scores: jax.Array) -> jax.Array:
        if self.soft_cap is None:
            return scores * (self.scale * LOG2E)
        return jnp.tanh(scores * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2E)

    def _visible(self, work: Work, keys: KeyRange, start: jax.Array) -> jax.Array:
        """bool[ROWS, kv_tile]: which key, of those from position `start` on, each query sees.

        Of a row whose first tiles are masked altogether the sums hold nonsense, until a visible score raises `top`
        and `decay` becomes 0; if none comes in this item, a merge gives the partial no weight.
        """
        shape = (ROWS, self.tiles.kv_tile)
        key = self.wg.iota(shape, 1) + start
        if self.tokens_per_tile == 1:
            return (key < work.kv_hi) & (key >= keys.first_seen)
        shift = jnp.int32(self.token_rows.bit_length() - 1)
        query = lax.shift_right_logical(self.wg.iota(shape, 0), jnp.full(shape, shift)) + work.position
        if self.sliding_window is None:
            return key <= query
        # One comparison and few registers: keys after the query are far away as unsigned numbers.
        return (query - key).astype(jnp.uint32) < jnp.uint32(self.sliding_window)

    def _zero_unseen_values(self, values: Any, work: Work, keys: KeyRange, start: jax.Array) -> None:
        """Zeros values that no query of the item sees: they may be NaN, which a weight of 0 does not silence."""

        columns = math.gcd(self.head_dim, _ZEROED_COLUMNS)

        @pl.when((start < keys.first_seen) | (start + self.tiles.kv_tile > work.kv_hi))
        def _() -> None:
            position = self.wg.iota((self.tiles.kv_tile, columns), 0) + start
            seen = (position >= keys.first_seen) & (position < work.kv_hi)
            for first in range(0, self.head_dim, columns):
                part = values.at[:, pl.ds(first, columns)]
                part[...] = jnp.where(seen, self.wg.load(part), jnp.zeros((), self.dtype))
            plgpu.commit_smem()  # wgmma reads by another path than stores write

    def _store(self, operands: Operands, shared: Shared, work: Work, softmax: Softmax) -> None:
        """Writes the result of an item that has all keys of its tokens; zeros where it has none."""
        wg, (acc, top, total) = self.wg, softmax
        scale = jnp.where(total > 0.0, 1.0 / total, 0.0)
        if self.has_sinks:  # the rest of the softmax, were the sink a key whose value is 0
            sink = wg.load_rows(operands.sinks.at[work.head])
            highest = jnp.maximum(top, sink)
            decay = jnp.exp2(top - highest)
            scale = decay / (total * decay + jnp.exp2(sink - highest))
        _, result = shared.results
        wg.store_slowly(result, (acc * wg.over_columns(scale, self.head_dim)).astype(self.dtype))
        self._for_each_token(
            work,
            lambda index: plgpu.copy_smem_to_gmem(
                result.at[pl.ds(index * self.token_rows, self.group)],
                operands.out.at[pl.ds(self._row(work, index, self.group), self.group)],
            ),
        )

    def _store_partial(self, operands: Operands, shared: Shared, work: Work, softmax: Softmax) -> None:
        """Writes what an item's keys come to, and the logarithm of their weight: `merge.Partials`."""
        wg, (acc, top, total) = self.wg, softmax
        result, _ = shared.results
        seen = total > 0.0
        wg.store_slowly(result, acc * wg.over_columns(jnp.where(seen, 1.0 / total, 0.0), self.head_dim))
        shared.log_weight[...] = jnp.where(seen, top + jnp.log2(total), MASKED)

        def copy_token(index: int) -> None:
            rows = pl.ds(index * self.token_rows, self.token_rows)
            plgpu.copy_smem_to_gmem(result.at[rows], operands.partial_out.at[work.partial, work.head, rows])

        self._for_each_token(work, copy_token)
        plgpu.copy_smem_to_gmem(shared.log_weight, operands.partial_log_weight.at[work.partial, work.head])

    def _for_each_token(self, work: Work, copy: Callable[[int], None]) -> None:
        """Starts the copies of what was stored in shared memory, one a token."""
        plgpu.commit_smem()
        for index in range(self.tokens_per_tile):
            pl.when(index < work.num_tokens)(lambda index=index: copy(index))
