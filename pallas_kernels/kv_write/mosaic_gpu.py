"""kv_write for NVIDIA Hopper GPUs (Pallas Mosaic GPU): bulk copies by the tensor memory accelerator."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_operand
from pallas_kernels.kv_write.tiles import WriteTiles, write_tiles
from pallas_kernels.numerics import to_storage

MAX_BOX = 256  # elements along an axis of one bulk copy
COPY_BYTES = 16  # bulk copies move multiples of this


def kv_write_mosaic_gpu(
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    slots: jax.Array,  # i32[tokens]
    *,
    tiles: WriteTiles | None = None,  # by default write_tiles of a token's bytes
    interpret: Any = False,  # parameters of the Mosaic GPU interpreter: runs on a CPU
) -> tuple[jax.Array, jax.Array]:
    """Copies a tile of tokens to shared memory, and each token's row of all heads from there to its slot.

    Grid (tokens / tile). HBM: k and v read once, their slots written once. A token's K (or V) of all heads is one
    contiguous row on both sides, so a tile is one bulk copy in, and a token one bulk copy out: no thread touches a
    value, whatever head_dim is. The pools are mutable references, aliased from the donated arguments of the enclosing
    jit to its results: nothing else of them is read, written or copied.

    # k     | t0 t1 t2 t3 |  tile 0        one copy to shared memory
    # slots | 33 95  0 40 |                33 -> k_pool[2, 1], 95 -> k_pool[5, 15], ... with blocks of 16
    """
    _check_supported(k)
    num_tokens, kv_heads, head_dim = k.shape
    num_blocks, block_size = k_pool.shape[:2]
    k, v = to_storage(k, k_pool.dtype), to_storage(v, k_pool.dtype)
    tiles = tiles or write_tiles(kv_heads * head_dim * k.dtype.itemsize)
    tile = math.gcd(num_tokens, tiles.tokens)  # so that no tile hangs over the end

    def kv_write(k_ref: Any, v_ref: Any, slots_ref: Any, k_pool_ref: Any, v_pool_ref: Any) -> None:
        def copy(k_smem: Any, v_smem: Any, arrived: Any) -> None:
            first = lax.axis_index("tile") * tile
            plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(first, tile)], k_smem, arrived)
            plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(first, tile)], v_smem, arrived)
            plgpu.barrier_wait(arrived)
            plgpu.commit_smem()  # what the copies in wrote is visible to the copies out
            for index in range(tile):
                slot = slots_ref[first + index]
                block = lax.div(slot, jnp.int32(block_size))
                offset = lax.rem(slot, jnp.int32(block_size))

                @pl.when((slot >= 0) & (block < num_blocks))
                def _(index: int = index, block: Any = block, offset: Any = offset) -> None:
                    plgpu.copy_smem_to_gmem(k_smem.at[index], k_pool_ref.at[block, offset])
                    plgpu.copy_smem_to_gmem(v_smem.at[index], v_pool_ref.at[block, offset])

            plgpu.wait_smem_to_gmem(0)

        rows = plgpu.SMEM((tile, kv_heads, head_dim), k.dtype)
        pl.run_scoped(copy, rows, rows, plgpu.Barrier(num_arrivals=2))

    k_pool_ref, v_pool_ref = (jax.new_ref(pool, memory_space=plgpu.GMEM) for pool in (k_pool, v_pool))
    operands = [gpu_operand(x, interpret=interpret) for x in (k, v, slots)]
    mesh = plgpu.Mesh(grid=(num_tokens // tile,), grid_names=("tile",))
    kernel: Any = pl.kernel(kv_write, out_type=(), mesh=mesh, interpret=interpret)
    kernel(*operands, k_pool_ref, v_pool_ref)
    return jax.freeze(k_pool_ref), jax.freeze(v_pool_ref)


def _check_supported(k: jax.Array) -> None:
    _, kv_heads, head_dim = k.shape
    if head_dim > MAX_BOX or kv_heads > MAX_BOX:
        raise NotImplementedError(
            f"mosaic_gpu copies rows of at most {MAX_BOX} heads of at most {MAX_BOX}, got {kv_heads} of {head_dim}"
        )
    if head_dim * 2 % COPY_BYTES:
        raise NotImplementedError(f"mosaic_gpu takes a head_dim that is a multiple of 8, got {head_dim}")
