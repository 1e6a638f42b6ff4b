"""Ragged paged attention for TPU: one kernel for decodes and for query tiles, flash attention over copied blocks.

Checked in interpret mode on CPU and compiled for v5e and v6e; no TPU ever ran it.

One program walks the host's work list. An item is a run of tokens of one row; its keys come in tiles of whole blocks,
copied from the pools while the tile before them is computed, across items too:

    tables   0.0  0.1     | 1.0           | ...
    copies   q0 K0.0 V0.0 | K0.1 V0.1  q1 | K1.0 V1.0 | ...
    compute               | tile 0.0      | tile 0.1  | tile 1.0 | ...

Block tables stay in HBM, however large; where the blocks of a tile lie comes to SMEM one tile ahead of their copies.

HBM: q and out once; K and V once an item, as far as its tokens see them (a sliding window skips the blocks before it);
of block tables 1 KiB a tile.

Matrix products have the query heads of a group as rows, and its lanes as what they contract over. A group is

    decode   all heads: row h holds its query in the lanes of its KV head and zeros in all others, so that one product
             gives every head's scores. The MXU is bound by loading K and V as weights, which this does once; products
             of 4 rows a KV head would leave half of each register empty.
    prefill  the heads of one unit of lanes (layout.py), each with all tokens of the tile:
             row h * query_tile + t is token t of query head h.

Online softmax in float32 (Milakov and Gimelshein 2018; Dao et al. 2022, FlashAttention); scalars and double buffering
follow ragged paged attention as jax.experimental.pallas.ops.tpu ships it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.mosaic_tpu.layout import LANES, HeadLayout
from pallas_kernels.paged_attention.mosaic_tpu.plan import WorkList
from pallas_kernels.paged_attention.mosaic_tpu.settings import Settings, cost, scratch_shapes, vmem_bytes

Ref = Any  # of pallas; its types are private
LANE_BITS = LANES.bit_length() - 1  # entries are found by shifts: `//` and `%` would look after negative numbers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """Scalars of one item, on the device."""

    row: jax.Array
    token: jax.Array  # the first
    position: jax.Array  # of the first token
    len: jax.Array
    end: jax.Array  # positions that the last token sees
    first_seen: jax.Array  # position that the first token sees first
    first_block: jax.Array  # of the block table
    num_tiles: jax.Array


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """The refs of the running kernel, and the steps that it is made of."""

    settings: Settings
    tables: Ref  # i32[parts, 1, LANES] in HBM, one row's entries after the other's
    work: WorkList  # of refs in SMEM
    q: Ref  # [tokens, q_rows, unit_lanes] in HBM
    sinks: Ref  # f32[q_rows, LANES] in VMEM
    k_pool: Ref  # [num_blocks, block_size, lanes] in HBM
    v_pool: Ref
    out: Ref  # as q
    table_buffer: Ref  # i32[2, table_parts, 1, LANES] in SMEM, entries of a tile's blocks
    q_buffer: Ref  # [2, query_tile, q_rows, unit_lanes]; two: one is copied while the other is computed
    k_buffer: Ref  # [2, kv_tile, lanes]
    v_buffer: Ref
    out_buffer: Ref  # as q_buffer
    queries: Ref  # [groups, group_rows, group_lanes]
    top: Ref  # f32[groups, group_rows, LANES], the highest score so far, in each lane
    total: Ref  # as top, the sum of exp(score - top)
    weighted: Ref  # f32[groups, group_rows, group_lanes], the sum of exp(score - top) * value
    semaphores: Ref  # [4, 2]: of q, of K and V, of out, of tables
    heads: Ref | None = None  # f32[query_tile, q_rows, unit_lanes], query tiles only: packed rows have no stride

    def run(self) -> None:
        """Computes every item of the work list."""
        num_items = self.work.num_items[0]

        @pl.when(num_items > 0)
        def _() -> None:
            self.start_queries(self.item(0), 0)
            self.start_table(self.item(0), 0, 0)
            self.start_tile(0, 0, 0, num_items)

        jax.lax.fori_loop(0, num_items, functools.partial(self.compute_item, num_items=num_items), jnp.int32(0))
        for back in (2, 1):

            @pl.when(num_items >= back)
            def _(back: int = back) -> None:
                self.wait_results(self.item(num_items - back), (num_items - back) % 2)

    def item(self, index: jax.Array | int) -> _Item:
        """Item `index` of the work list."""
        position, length = self.work.positions[index], self.work.lens[index]
        end = position + length
        window = self.settings.sliding_window
        first_seen = jnp.int32(0) if window is None else jnp.maximum(position - (window - 1), 0)
        first_block = first_seen // self.settings.block_size
        tile = self.settings.tiles.kv_tile
        return _Item(
            row=self.work.rows[index],
            token=self.work.tokens[index],
            position=position,
            len=length,
            end=end,
            first_seen=first_seen,
            first_block=first_block,
            num_tiles=(end - first_block * self.settings.block_size + (tile - 1)) // tile,
        )

    # Copies. Each start has a wait that moves as many bytes through the same semaphore.

    def start_queries(self, item: _Item, buffer: jax.Array | int) -> None:
        self._copy_tokens(item, self.q, self.q_buffer.at[buffer], self.semaphores.at[0, buffer], "start", inward=True)

    def wait_queries(self, item: _Item, buffer: jax.Array | int) -> None:
        self._copy_tokens(item, self.q, self.q_buffer.at[buffer], self.semaphores.at[0, buffer], "wait", inward=True)

    def start_results(self, item: _Item, buffer: jax.Array | int) -> None:
        self._copy_tokens(
            item, self.out, self.out_buffer.at[buffer], self.semaphores.at[2, buffer], "start", inward=False
        )

    def wait_results(self, item: _Item, buffer: jax.Array | int) -> None:
        self._copy_tokens(
            item, self.out, self.out_buffer.at[buffer], self.semaphores.at[2, buffer], "wait", inward=False
        )

    def _copy_tokens(self, item: _Item, far: Ref, near: Ref, semaphore: Ref, action: str, *, inward: bool) -> None:
        """One copy for a full tile, otherwise one a token: a copy's size is fixed when it is compiled."""

        def copy(far_part: Ref, near_part: Ref) -> None:
            source, target = (far_part, near_part) if inward else (near_part, far_part)
            getattr(pltpu.make_async_copy(source, target, semaphore), action)()

        def copy_token(index: jax.Array, carry: None) -> None:
            copy(far.at[item.token + index], near.at[index])
            return carry

        tile = self.settings.tiles.query_tile

        @pl.when(item.len == tile)
        def _() -> None:
            copy(far.at[pl.ds(item.token, tile)], near)

        @pl.when(item.len != tile)
        def _() -> None:
            jax.lax.fori_loop(0, item.len, copy_token, None)

    def start_tile(
        self, index: jax.Array | int, tile: jax.Array | int, buffer: jax.Array | int, num_items: jax.Array
    ) -> None:
        """Keys of a tile whose table is on its way to `buffer`; then the table of the tile after it, to the other."""
        self._copy_table(0, buffer, "wait")
        self.start_keys(self.item(index), tile, buffer)
        next_index, next_tile = self.after(index, tile)

        @pl.when(next_index < num_items)
        def _() -> None:
            self.start_table(self.item(next_index), next_tile, 1 - buffer)

    def after(self, index: jax.Array | int, tile: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        """Item and tile that are computed after these."""
        is_last = tile + 1 == self.item(index).num_tiles
        return jnp.where(is_last, index + 1, index), jnp.where(is_last, 0, tile + 1)

    def start_table(self, item: _Item, tile: jax.Array | int, buffer: jax.Array | int) -> None:
        self._copy_table(self._first_entry(item, tile) >> LANE_BITS, buffer, "start")

    def _copy_table(self, part: jax.Array | int, buffer: jax.Array | int, action: str) -> None:
        source = self.tables.at[pl.ds(part, self.settings.table_parts)]
        copy = pltpu.make_async_copy(source, self.table_buffer.at[buffer], self.semaphores.at[3, buffer])
        getattr(copy, action)()

    def _first_entry(self, item: _Item, tile: jax.Array | int) -> jax.Array:
        return item.row * self.settings.blocks_per_seq + item.first_block + tile * self.settings.tile_blocks

    def start_keys(self, item: _Item, tile: jax.Array | int, buffer: jax.Array | int) -> None:
        self._copy_blocks(item, tile, buffer, "start")

    def wait_keys(self, item: _Item, tile: jax.Array | int, buffer: jax.Array | int) -> None:
        self._copy_blocks(item, tile, buffer, "wait")

    def _copy_blocks(self, item: _Item, tile: jax.Array | int, buffer: jax.Array | int, action: str) -> None:
        block_size = self.settings.block_size
        tile_blocks = self.settings.tile_blocks
        first = item.first_block + tile * tile_blocks
        num_blocks = jnp.minimum((item.end + (block_size - 1)) // block_size - first, tile_blocks)
        first_entry = self._first_entry(item, tile) & (LANES - 1)

        def copy_block(index: jax.Array, carry: None) -> None:
            entry = first_entry + index
            block = 0  # a wait counts bytes, whichever block they are of; its table may have been overwritten
            if action == "start":
                block = self.table_buffer[buffer, entry >> LANE_BITS, 0, entry & (LANES - 1)]
            rows = pl.ds(pl.multiple_of(index * block_size, block_size), block_size)
            for pool, near in ((self.k_pool, self.k_buffer), (self.v_pool, self.v_buffer)):
                copy = pltpu.make_async_copy(pool.at[block], near.at[buffer, rows], self.semaphores.at[1, buffer])
                getattr(copy, action)()
            return carry

        jax.lax.fori_loop(0, num_blocks, copy_block, None)

    def compute_item(self, index: jax.Array, buffer: jax.Array, *, num_items: jax.Array) -> jax.Array:
        """Attention of one item, whose first keys are on their way to `buffer`; returns the next item's buffer."""
        item = self.item(index)
        parity = index % 2

        @pl.when(index + 1 < num_items)
        def _() -> None:
            self.start_queries(self.item(index + 1), 1 - parity)

        self.wait_queries(item, parity)
        self.pack_queries(parity)
        self.set_initial_sums()

        def compute_tile(tile: jax.Array, buffer: jax.Array) -> jax.Array:
            next_index, next_tile = self.after(index, tile)

            @pl.when(next_index < num_items)
            def _() -> None:
                self.start_tile(next_index, next_tile, 1 - buffer, num_items)

            self.wait_keys(item, tile, buffer)
            self.attend_tile(item, tile, buffer)
            return 1 - buffer

        buffer = jax.lax.fori_loop(0, item.num_tiles, compute_tile, buffer)

        @pl.when(index >= 2)
        def _() -> None:
            self.wait_results(self.item(index - 2), parity)

        self.unpack_results(parity)
        self.start_results(item, parity)
        return buffer

    # Rows of the matrix products.

    def pack_queries(self, buffer: jax.Array) -> None:
        """Fills `queries` from the copied tokens."""
        layout, tile = self.settings.layout, self.settings.tiles.query_tile
        if self.heads is None:
            heads = self.q_buffer[buffer, 0].astype(jnp.float32)
            for unit in range(layout.units):
                own = jnp.where(self._reads(unit), heads, 0.0)
                self.queries[0, :, _lanes_of(unit, layout)] = own.astype(self.queries.dtype)
            return
        self.heads[...] = self.q_buffer[buffer].astype(jnp.float32)
        for unit in range(layout.units):
            for row, head in enumerate(layout.q_heads_of(unit)):
                self.queries[unit, pl.ds(row * tile, tile)] = self.heads[:, head].astype(self.queries.dtype)

    def set_initial_sums(self) -> None:
        """The softmax begins with each head's sink, a score without a value. MASKED: none, the first score wipes it."""
        layout, tile = self.settings.layout, self.settings.tiles.query_tile
        self.total[...] = jnp.ones_like(self.total)
        self.weighted[...] = jnp.zeros_like(self.weighted)
        if self.heads is None:
            self.top[0] = self.sinks[...]
            return
        for unit in range(layout.units):
            for row, head in enumerate(layout.q_heads_of(unit)):
                sink = jnp.broadcast_to(self.sinks[pl.ds(head, 1)], (tile, LANES))
                self.top[unit, pl.ds(row * tile, tile)] = sink

    def unpack_results(self, buffer: jax.Array) -> None:
        """Puts the attention of the item's tokens into `out_buffer`."""
        layout, tile = self.settings.layout, self.settings.tiles.query_tile
        if self.heads is None:
            out = jnp.zeros((layout.q_rows, layout.unit_lanes), jnp.float32)
            for unit in range(layout.units):
                out = jnp.where(self._reads(unit), self.weighted[0, :, _lanes_of(unit, layout)], out)
            self.out_buffer[buffer, 0] = (out / self.total[0, :, :1]).astype(self.out_buffer.dtype)
            return
        for unit in range(layout.units):
            for row, head in enumerate(layout.q_heads_of(unit)):
                rows = pl.ds(row * tile, tile)
                self.heads[:, head] = self.weighted[unit, rows] / self.total[unit, rows, :1]
        self.out_buffer[buffer] = self.heads[...].astype(self.out_buffer.dtype)

    def _reads(self, unit: int) -> jax.Array:
        """bool[q_rows, unit_lanes]: query heads that read a unit."""
        layout = self.settings.layout
        head = jax.lax.broadcasted_iota(jnp.int32, (layout.q_rows, layout.unit_lanes), 0)
        heads = layout.q_heads_of(unit)
        return (head >= heads.start) & (head < heads.stop)

    # Flash attention.

    def attend_tile(self, item: _Item, tile: jax.Array, buffer: jax.Array) -> None:
        """Adds the keys of a tile to the running softmax, chunk by chunk as far as the item sees it."""
        tiles, window = self.settings.tiles, self.settings.sliding_window
        start = item.first_block * self.settings.block_size + tile * tiles.kv_tile
        seen = jnp.minimum(item.end - start, tiles.kv_tile)

        def attend_chunk(index: jax.Array, carry: None) -> None:
            rows = pl.ds(pl.multiple_of(index * tiles.kv_chunk, tiles.kv_chunk), tiles.kv_chunk)
            first = start + index * tiles.kv_chunk
            is_partial = first + tiles.kv_chunk > item.end  # holds slots that nobody wrote or copied
            hides = first + tiles.kv_chunk > item.position + 1  # holds positions that some token does not see
            if window is not None:
                is_partial |= first < item.first_seen
                hides |= first < item.end - window

            @pl.when(is_partial)
            def _() -> None:
                self._clear_unseen_values(item, first, buffer, rows)

            pl.when(hides)(lambda: self._attend(item, first, buffer, rows, masks=True))
            pl.when(jnp.logical_not(hides))(lambda: self._attend(item, first, buffer, rows, masks=False))
            return carry

        jax.lax.fori_loop(0, (seen + (tiles.kv_chunk - 1)) // tiles.kv_chunk, attend_chunk, None)

    def _clear_unseen_values(self, item: _Item, first: jax.Array, buffer: jax.Array, rows: Any) -> None:
        """Their weight is zero, and zero times whatever lies there may be nan."""
        values = self.v_buffer[buffer, rows]
        position = first + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        is_seen = (position >= item.first_seen) & (position < item.end)
        self.v_buffer[buffer, rows] = jnp.where(is_seen, values.astype(jnp.float32), 0.0).astype(values.dtype)

    def _attend(self, item: _Item, first: jax.Array, buffer: jax.Array, rows: Any, *, masks: bool) -> None:
        settings = self.settings
        is_seen = self._seen(item, first) if masks else None

        def attend_groups(index: jax.Array, carry: None) -> None:
            for offset in range(settings.groups_at_once):
                self._attend_group(index * settings.groups_at_once + offset, buffer, rows, is_seen)
            return carry

        jax.lax.fori_loop(0, settings.groups // settings.groups_at_once, attend_groups, None)

    def _attend_group(self, group: jax.Array, buffer: jax.Array, rows: Any, is_seen: jax.Array | None) -> None:
        settings = self.settings
        lanes = pl.ds(pl.multiple_of(group * settings.group_lanes, settings.group_lanes), settings.group_lanes)
        scores = _dot(self.queries[group], self.k_buffer[buffer, rows, lanes], contract=1) * settings.scale
        if settings.soft_cap is not None:
            scores = settings.soft_cap * jnp.tanh(scores / settings.soft_cap)
        if is_seen is not None:
            scores = jnp.where(is_seen, scores, MASKED)
        old_top = self.top[group]
        top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - top[:, :1])
        shrink = jnp.exp(old_top - top)
        self.top[group] = top
        self.total[group] = shrink * self.total[group] + jnp.sum(weights, axis=1, keepdims=True)
        values = self.v_buffer[buffer, rows, lanes]
        added = _dot(weights.astype(values.dtype), values, contract=0)
        self.weighted[group] = shrink[:, :1] * self.weighted[group] + added

    def _seen(self, item: _Item, first: jax.Array) -> jax.Array:
        """bool[group_rows, kv_chunk]: keys that a row's token sees."""
        shape = (self.settings.group_rows, self.settings.tiles.kv_chunk)
        key = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        query = item.position
        if not self.settings.is_decode:
            query += jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (self.settings.tiles.query_tile - 1)
        is_seen = key <= query
        window = self.settings.sliding_window
        return is_seen if window is None else is_seen & (key > query - window)


def _lanes_of(unit: int, layout: HeadLayout) -> Any:
    return pl.ds(unit * layout.unit_lanes, layout.unit_lanes)


def _dot(x: jax.Array, y: jax.Array, *, contract: int) -> jax.Array:
    """f32 product of x [m, n] with y over its dimension `contract`."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == jnp.float32 else None
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def attend(
    q: jax.Array,  # [tokens, q_rows, unit_lanes], tokens >= query_tile
    k_pool: jax.Array,  # [num_blocks, block_size, lanes]
    v_pool: jax.Array,
    sinks: jax.Array,  # f32[q_rows], MASKED for none
    tables: jax.Array,  # i32[rows, blocks_per_seq]
    work: WorkList,
    out: jax.Array,  # as q
    *,
    settings: Settings,
    interpret: Any = False,
) -> jax.Array:
    """`out` with the tokens of the work list replaced by their attention, in place."""
    scalars, tree = jax.tree.flatten(work)
    table_buffer = pltpu.SMEM((2, settings.table_parts, 1, LANES), jnp.int32)
    scratch = {"table_buffer": table_buffer, **scratch_shapes(settings)}
    # Copies are of `table_parts` whole parts, also of a tile whose blocks are the last.
    tables = jnp.pad(tables.reshape(-1), (0, -tables.size % LANES + (settings.table_parts - 1) * LANES))
    tables = tables.reshape(-1, 1, LANES)

    def kernel(*refs: Ref) -> None:
        q, sinks, tables, k_pool, v_pool, _, out, *buffers, semaphores = refs[len(scalars) :]
        io = {"q": q, "sinks": sinks, "k_pool": k_pool, "v_pool": v_pool, "out": out, "semaphores": semaphores}
        buffers = dict(zip(scratch, buffers, strict=True))
        work = jax.tree.unflatten(tree, refs[: len(scalars)])
        _Kernel(settings=settings, tables=tables, work=work, **io, **buffers).run()

    if not interpret:  # XLA would copy pools smaller than VMEM to it, whole, and leave the tables there
        constrained = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (tables, k_pool, v_pool))
        tables, k_pool, v_pool = constrained
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[in_hbm, pl.BlockSpec(memory_space=pltpu.VMEM), in_hbm, in_hbm, in_hbm, in_hbm],
            out_specs=in_hbm,
            scratch_shapes=[*scratch.values(), pltpu.SemaphoreType.DMA((4, 2))],
        ),
        input_output_aliases={len(scalars) + 5: 0},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_bytes(settings)),
        cost_estimate=cost(settings, num_items=work.rows.shape[0], num_tokens=q.shape[0]),
        name="paged_decode" if settings.is_decode else "paged_prefill",
        interpret=interpret,
    )(*scalars, q, jnp.broadcast_to(sinks[:, None], (len(sinks), LANES)), tables, k_pool, v_pool, out)
