"""rotate_and_write for NVIDIA Hopper GPUs (Pallas Mosaic GPU): one kernel from projections to pools.

Why it is one kernel: compiled for an H100, XLA makes three of the rotation (queries, keys, and a copy of the values,
since what a hand-written kernel reads must be an array of its own), and kv_write is the fourth; here it is one, or two
where the projection is split along its inner dimension and XLA sums the parts in another. With 32 layers that is 64 to
96 launches a step less, and each costs more than the work in it: at 256 tokens of Llama-3.1-8B a layer reads 3 MiB
here and writes as much, two microseconds at 3 TB/s. Keys and values also travel to HBM once and not twice, 1 MiB less
each way. A step of one sequence takes 5 ms for its weights alone; at a microsecond a launch the kernel saves 1 to 2 %
of it. This is counted, not measured.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_operand
from pallas_kernels.kv_write.mosaic_gpu import COPY_BYTES, MAX_BOX

_TILE = 8  # tokens: each of a block's 128 threads holds a few pairs of each head


def takes(qkv: jax.Array, k_pool: jax.Array) -> bool:
    """Whether the kernel takes these: one dtype of 16 bits, halves of a head that bulk copies can move.

    And a tile of halves must fall evenly to 128 threads: of the head sizes that attention takes, 80 is refused here.
    """
    half = qkv.shape[3] // 2
    is_narrow = qkv.dtype == k_pool.dtype and qkv.dtype.itemsize == 2
    return is_narrow and half * 2 % COPY_BYTES == 0 and _TILE * half % 128 == 0 and 2 * half <= MAX_BOX


def rotate_and_write_mosaic_gpu(
    qkv: jax.Array,  # [tokens, kv_heads, group + 2, head_dim]
    cos: jax.Array,  # f32[tokens, head_dim / 2]
    sin: jax.Array,
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    slots: jax.Array,  # i32[tokens]
    *,
    interpret: Any = False,  # parameters of the Mosaic GPU interpreter: runs on a CPU
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates a tile of 8 tokens of one KV head in shared memory, and sends it on to queries and pools.

    Grid (tokens / 8, kv_heads). HBM: qkv read once, queries written once, each slot written once, cos and sin read
    once a head. The two halves of a head lie apart in shared memory, so that both sides of a pair, and their cos and
    sin, have the same place in arrays of one shape and a thread rotates what it loads. The last tile may hang over the
    end: bulk copies read zeros there and write nothing.

    # rotated [group + 1, 2, 8, head_dim / 2]: queries, then the key; first halves, second halves; tokens
    """
    num_tokens, kv_heads, parts, head_dim = qkv.shape
    num_heads, half = parts - 1, head_dim // 2  # queries and the key are rotated
    num_blocks, block_size = k_pool.shape[:2]

    def rotate_and_write(
        qkv_ref: Any, cos_ref: Any, sin_ref: Any, slots_ref: Any, k_pool_ref: Any, v_pool_ref: Any, q_ref: Any
    ) -> None:
        first, kv_head = lax.axis_index("tile") * _TILE, lax.axis_index("kv_head")
        tokens = pl.ds(first, _TILE)

        def tile(rotated: Any, value: Any, angles: Any, arrived: Any) -> None:
            for head, side in _halves(num_heads):
                source = qkv_ref.at[tokens, kv_head, head, pl.ds(side * half, half)]
                plgpu.copy_gmem_to_smem(source, rotated.at[head, side], arrived)
            plgpu.copy_gmem_to_smem(qkv_ref.at[tokens, kv_head, num_heads], value, arrived)
            plgpu.copy_gmem_to_smem(cos_ref.at[tokens], angles.at[0], arrived)
            plgpu.copy_gmem_to_smem(sin_ref.at[tokens], angles.at[1], arrived)
            plgpu.barrier_wait(arrived)
            _rotate(rotated, angles, num_heads)
            plgpu.commit_smem()
            for head, side in _halves(num_heads - 1):
                target = q_ref.at[tokens, kv_head, head, pl.ds(side * half, half)]
                plgpu.copy_smem_to_gmem(rotated.at[head, side], target)
            for index in range(_TILE):

                @pl.when(first + index < num_tokens)
                def _(index: int = index) -> None:
                    write(slots_ref[first + index], index, rotated, value)

            plgpu.wait_smem_to_gmem(0)

        def write(slot: Any, index: int, rotated: Any, value: Any) -> None:
            block, offset = lax.div(slot, jnp.int32(block_size)), lax.rem(slot, jnp.int32(block_size))

            @pl.when((slot >= 0) & (block < num_blocks))
            def _() -> None:
                for side in range(2):
                    target = k_pool_ref.at[block, offset, kv_head, pl.ds(side * half, half)]
                    plgpu.copy_smem_to_gmem(rotated.at[num_heads - 1, side, index], target)
                plgpu.copy_smem_to_gmem(value.at[index], v_pool_ref.at[block, offset, kv_head])

        pl.run_scoped(
            tile,
            plgpu.SMEM((num_heads, 2, _TILE, half), qkv.dtype),
            plgpu.SMEM((_TILE, head_dim), qkv.dtype),
            plgpu.SMEM((2, _TILE, half), jnp.float32),
            plgpu.Barrier(num_arrivals=2 * num_heads + 3),
        )

    kernel: Any = pl.kernel(
        rotate_and_write,
        out_type=jax.ShapeDtypeStruct((num_tokens, kv_heads, num_heads - 1, head_dim), qkv.dtype),
        mesh=plgpu.Mesh(grid=(pl.cdiv(num_tokens, _TILE), kv_heads), grid_names=("tile", "kv_head")),
        # Before 0.11 the default would not find one layout for 16-bit and 32-bit values.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    operands = [gpu_operand(x, interpret=interpret) for x in (qkv, cos, sin, slots)]
    k_pool_ref, v_pool_ref = (jax.new_ref(pool, memory_space=plgpu.GMEM) for pool in (k_pool, v_pool))
    q = kernel(*operands, k_pool_ref, v_pool_ref)
    return q, jax.freeze(k_pool_ref), jax.freeze(v_pool_ref)


def _halves(num_heads: int) -> list[tuple[int, int]]:
    return [(head, side) for head in range(num_heads) for side in range(2)]


def _rotate(rotated: Any, angles: Any, num_heads: int) -> None:
    """Rotates all heads of a tile in place; cos and sin stay in registers."""
    cos, sin = angles[0], angles[1]
    for head in range(num_heads):
        first, second = (rotated[head, side].astype(jnp.float32) for side in range(2))
        rotated[head, 0] = (first * cos - second * sin).astype(rotated.dtype)
        rotated[head, 1] = (second * cos + first * sin).astype(rotated.dtype)
