"""Where every position of a batch lies in the pools: what the layers of a step share.

Each layer asks for it, and XLA computes it once a step, because nothing in it depends on the layer. Every slot may be
read, whatever its position: positions outside of what a row sees have the slot of the nearest one inside:

    position   0 1 2 3 4 5 6 7
    slot       d d d d e f f f   sees 3, 4, 5
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.metadata import AttentionMetadata


def row_slots(metadata: AttentionMetadata, *, block_size: int, chunk: int, sliding_window: int | None) -> jax.Array:
    """i32[rows, positions in whole chunks]: of the batch's rows; a row sees what any of its queries sees."""
    query_lens = metadata.query_starts[1:] - metadata.query_starts[:-1]
    firsts = None if sliding_window is None else metadata.kv_lens - query_lens - (sliding_window - 1)
    return _slots(metadata.block_tables, firsts, metadata.kv_lens, block_size, chunk)


def common_slots(metadata: AttentionMetadata, *, block_size: int, chunk: int) -> jax.Array:
    """i32[positions in whole chunks]: of the first row, whose leading chunks may be all rows'."""
    return _slots(metadata.block_tables[:1], None, metadata.kv_lens[:1], block_size, chunk)[0]


def decode_slots(metadata: AttentionMetadata, *, block_size: int, chunk: int, sliding_window: int | None) -> jax.Array:
    """i32[decodes, positions in whole chunks]: of the decode plan's rows, in its order."""
    tables = metadata.block_tables.at[metadata.plan.decode_rows].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    firsts = None if sliding_window is None else metadata.plan.decode_lens - sliding_window
    return _slots(tables, firsts, metadata.plan.decode_lens, block_size, chunk)


def _slots(
    tables: jax.Array,  # i32[rows, blocks_per_seq]
    firsts: jax.Array | None,  # i32[rows], may be negative
    lens: jax.Array,  # i32[rows]
    block_size: int,
    chunk: int,
) -> jax.Array:
    rows, blocks = tables.shape
    positions = -(-blocks * block_size // chunk) * chunk
    slots = (tables * block_size)[:, :, None] + jnp.arange(block_size, dtype=jnp.int32)
    slots = jax.lax.pad(slots.reshape(rows, -1), jnp.int32(0), ((0, 0, 0), (0, positions - blocks * block_size, 0)))
    position = jax.lax.broadcasted_iota(jnp.int32, slots.shape, 1)
    lasts = jnp.maximum(lens - 1, 0)
    seen = jnp.where(position > lasts[:, None], _slot_of(tables, lasts, block_size)[:, None], slots)
    if firsts is not None:
        firsts = jnp.maximum(firsts, 0)
        seen = jnp.where(position < firsts[:, None], _slot_of(tables, firsts, block_size)[:, None], seen)
    return seen


def _slot_of(tables: jax.Array, positions: jax.Array, block_size: int) -> jax.Array:
    """i32[rows]: the slot of one position of each row."""
    size = jnp.int32(block_size)
    index = (jnp.arange(tables.shape[0], dtype=jnp.int32), jax.lax.div(positions, size))
    blocks = tables.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return blocks * size + jax.lax.rem(positions, size)
