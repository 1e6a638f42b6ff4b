"""How much of the work the TPU kernel takes at a time, and the VMEM that it needs for it."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_tpu.layout import LANES, HeadLayout

TILE_BYTES = 2 << 20  # K and V of one copy: 819 GB/s (v5e) x about 1 us until the first byte = 0.8 MB must be under way
MAX_KV_TILE = 2048  # tokens
KV_CHUNK = 512  # tokens whose scores are computed at a time; rows shorter than a tile skip its other chunks
PREFILL_ROWS = 256  # rows (query heads of a unit x tokens) of one matrix product: weights of the MXU change every 128
VMEM_BYTES = 96 << 20  # of 128 MiB on v5e and v6e; the rest is the compiler's


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes in tokens. `kv_tile` is a multiple of the block size and of `kv_chunk`."""

    query_tile: int
    kv_tile: int
    kv_chunk: int


def decode_tiles(geometry: AttentionGeometry) -> Tiles:
    """One token; as many keys a copy as keep the memory busy."""
    kv_tile, kv_chunk = _kv_tile(geometry)
    return Tiles(query_tile=1, kv_tile=kv_tile, kv_chunk=kv_chunk)


def prefill_tiles(geometry: AttentionGeometry) -> Tiles:
    """So many tokens that the heads of a unit make PREFILL_ROWS rows; a power of two from 16 to 128."""
    kv_tile, kv_chunk = _kv_tile(geometry)
    tokens = PREFILL_ROWS // layout_of(geometry).unit_q_heads
    query_tile = min(128, max(16, 1 << max(0, tokens.bit_length() - 1)))
    return Tiles(query_tile=query_tile, kv_tile=kv_tile, kv_chunk=kv_chunk)


def layout_of(geometry: AttentionGeometry) -> HeadLayout:
    """The lanes of a geometry."""
    return HeadLayout(q_heads=geometry.q_heads, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim)


def _kv_tile(geometry: AttentionGeometry) -> tuple[int, int]:
    slot_bytes = 2 * layout_of(geometry).lanes * jnp.dtype(geometry.dtype).itemsize
    step = _lcm_with_lanes(geometry.block_size)
    wanted = max(step, min(MAX_KV_TILE, TILE_BYTES // slot_bytes) // step * step)
    chunks = max(1, wanted // max(step, KV_CHUNK // step * step))
    chunk = wanted // chunks // step * step
    return chunk * chunks, chunk


def _lcm_with_lanes(block_size: int) -> int:
    """The smallest number of tokens that is whole blocks and whole lanes of scores."""
    tokens = block_size
    while tokens % LANES:
        tokens += block_size
    return tokens
