"""kv_write for TPU: rewrites the tiles of 8 slots that the new tokens lie in, in place.

Checked in interpret mode on CPU and compiled for v5e and v6e; no TPU ever ran it.

A copy to or from the pools moves whole tiles of 8 slots (paged_attention/mosaic_tpu/layout.py), so a tile is fetched,
gets its new rows, and is stored. A run is the tokens that share a tile; 16 fetches and 16 stores are under way at once:

    token   0   1  2  3  4  5   6   7          slots 40, 22..26, 0, 0 (block size 16)
    tile    5   2  2  3  3  3   0   0
    run     0   1  1  2  2  2   -   -          block 0 and slots outside the pool: nobody writes them

HBM: K and V of a run once in and once out, 8 slots each, and each token's K and V once as float32.

Not fused into attention, because it would not pay. A decode step of 256 sequences of Llama-3.1-8B on v5e moves 16 MiB
here in each layer (8 slots x 2 KiB x K and V x in and out x 256), 20 us at 819 GB/s. Fused it would be 8 MiB, since
attention fetches these slots anyway, and one launch of a few us fewer. In the same layer attention of 1024 tokens a
sequence moves 1 GiB (1.3 ms) and the weights 0.4 GiB (0.5 ms): fusing is worth less than 1 %. In prefill a run has 8
tokens, each moves 16 KiB here (20 ns) beside 436 MFLOP of products (2.2 us). And a fused kernel takes the new K and V
beside the pools, and has to see to it that no query tile reads a slot before another has written it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.paged_attention.mosaic_tpu.layout import SUBLANES, keys_to_lanes

CHUNK_BYTES = 1 << 20  # of K as float32 in a grid step: 256 tokens at 1024 lanes
DEPTH = 16  # runs whose tiles are being fetched, and as many that are being stored

Ref = Any  # of pallas; its types are private


def kv_write_mosaic_tpu(
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,
    k_pool: jax.Array,  # [num_blocks, block_size, lanes]
    v_pool: jax.Array,
    slots: jax.Array,  # i32[tokens]
    *,
    interpret: Any = False,  # as pallas_call takes it: True, or pltpu.InterpretParams
) -> tuple[jax.Array, jax.Array]:
    """Returns the pools with k and v written at `slots`.

    Tokens of one block lie side by side in the batch, as those of a sequence do; others may get lost.
    """
    num_blocks, block_size, lanes = k_pool.shape
    _check(k_pool, block_size)
    most = max(1, CHUNK_BYTES // (4 * lanes * SUBLANES))
    chunk = min(most, -(-k.shape[0] // SUBLANES)) * SUBLANES
    padding = -k.shape[0] % chunk
    is_written = (slots >= block_size) & (slots < num_blocks * block_size)
    slots = jnp.pad(jnp.where(is_written, slots, -1), (0, padding), constant_values=-1)
    runs, num_runs = _runs(slots, chunk)
    rows = [jnp.pad(keys_to_lanes(x, lanes).astype(jnp.float32), ((0, padding), (0, 0))) for x in (k, v)]
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    tokens = pl.BlockSpec((chunk, lanes), lambda step, *_: (step, 0))
    pool = jax.ShapeDtypeStruct(k_pool.shape, k_pool.dtype)
    if not interpret:  # XLA would copy pools smaller than VMEM to it, whole
        k_pool, v_pool = (pltpu.with_memory_space_constraint(pool, pltpu.HBM) for pool in (k_pool, v_pool))
    k_pool, v_pool = pl.pallas_call(
        _kernel,
        out_shape=(pool, pool),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(len(slots) // chunk,),
            in_specs=[tokens, tokens, in_hbm, in_hbm],
            out_specs=(in_hbm, in_hbm),
            scratch_shapes=[
                pltpu.VMEM((2, 2 * DEPTH, SUBLANES, lanes), k_pool.dtype),
                pltpu.VMEM((2, SUBLANES, lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2 * DEPTH)),
            ],
        ),
        input_output_aliases={5: 0, 6: 1},
        cost_estimate=_cost(len(slots), lanes, k_pool.dtype),
        name="kv_write",
        interpret=interpret,
    )(slots, runs, num_runs, *rows, k_pool, v_pool)
    return k_pool, v_pool


def _check(pool: jax.Array, block_size: int) -> None:
    if block_size % SUBLANES:
        raise NotImplementedError(f"blocks of {block_size}; the TPU kernel takes multiples of {SUBLANES}")
    if pool.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"pools of {pool.dtype}; the TPU kernel takes bfloat16 and float32")


def _runs(slots: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """i32[tokens], i32[chunks]: the first token of each run, packed to the front of its chunk, and how many.

    Nothing here depends on the layer: XLA computes it once a step.
    """
    tiles = jnp.where(slots < 0, -1, slots // SUBLANES).reshape(-1, chunk)
    before = jnp.pad(tiles[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    is_first = (tiles >= 0) & (tiles != before)
    token = jax.lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    firsts = jnp.sort(jnp.where(is_first, token, chunk), axis=1)
    return firsts.reshape(-1), is_first.sum(1, dtype=jnp.int32)


def _kernel(
    slots: Ref,  # i32[tokens] in SMEM, -1: not written
    runs: Ref,  # i32[tokens] in SMEM
    num_runs: Ref,  # i32[chunks] in SMEM
    k: Ref,  # f32[chunk, lanes]
    v: Ref,
    k_input: Ref,  # the same memory as k_pool
    v_input: Ref,
    k_pool: Ref,  # [num_blocks, block_size, lanes] in HBM
    v_pool: Ref,
    buffers: Ref,  # [K and V, 2 * DEPTH, SUBLANES, lanes]
    rows: Ref,  # f32[K and V, SUBLANES, lanes]: single rows of packed types cannot be stored
    semaphores: Ref,  # [fetch and store, 2 * DEPTH]
) -> None:
    del k_input, v_input
    chunk, block_size = k.shape[0], k_pool.shape[1]
    first_token = pl.program_id(0) * chunk
    count = num_runs[pl.program_id(0)]

    def copy(run: jax.Array, action: str, *, stores: int) -> None:
        slot = slots[first_token + runs[first_token + run]]
        offset = slot % block_size // SUBLANES * SUBLANES
        tile = pl.ds(pl.multiple_of(offset, SUBLANES), SUBLANES)
        buffer = run % (2 * DEPTH)
        for index, pool in enumerate((k_pool, v_pool)):
            ends = pool.at[slot // block_size, tile], buffers.at[index, buffer]
            source, target = reversed(ends) if stores else ends
            getattr(pltpu.make_async_copy(source, target, semaphores.at[stores, buffer]), action)()

    def rewrite(run: jax.Array) -> None:
        token, buffer = runs[first_token + run], run % (2 * DEPTH)
        tile = slots[first_token + token] // SUBLANES
        rows[...] = buffers[:, buffer].astype(jnp.float32)

        def put(token: jax.Array) -> jax.Array:
            row = pl.ds(slots[first_token + token] % SUBLANES, 1)
            rows[0, row] = k[pl.ds(token, 1)]
            rows[1, row] = v[pl.ds(token, 1)]
            return token + 1

        def is_in_run(token: jax.Array) -> jax.Array:
            slot = slots[first_token + jnp.minimum(token, chunk - 1)]
            return (token < chunk) & (slot >= 0) & (slot // SUBLANES == tile)

        jax.lax.while_loop(is_in_run, put, token)
        buffers[:, buffer] = rows[...].astype(buffers.dtype)

    def step(run: jax.Array, carry: None) -> None:
        pl.when(run >= DEPTH)(lambda: copy(run - DEPTH, "wait", stores=1))  # frees the buffer of the next fetch
        pl.when(run + DEPTH < count)(lambda: copy(run + DEPTH, "start", stores=0))
        copy(run, "wait", stores=0)
        rewrite(run)
        copy(run, "start", stores=1)
        return carry

    def repeat(begin: Any, end: Any, action: str, *, stores: int) -> None:
        jax.lax.fori_loop(begin, end, lambda run, _: copy(run, action, stores=stores), None)

    repeat(0, jnp.minimum(count, DEPTH), "start", stores=0)
    jax.lax.fori_loop(0, count, step, None)
    # A run may go on in the next chunk, which fetches what this one stored.
    repeat(jnp.maximum(count - DEPTH, 0), count, "wait", stores=1)


def _cost(num_tokens: int, lanes: int, dtype: Any) -> pl.CostEstimate:
    """An upper bound: every token in a tile of its own."""
    tile_bytes = SUBLANES * lanes * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=num_tokens * (4 * tile_bytes + 8 * lanes))
