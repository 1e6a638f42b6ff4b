"""How much of the work the TPU kernel takes at a time, and the VMEM that it needs for it."""

import dataclasses
import functools

import jax.numpy as jnp

from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_tpu.layout import LANES, HeadLayout
from pallas_kernels.tuned_tiles import tuned_tiles

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


def heuristic_decode_tiles(geometry: AttentionGeometry) -> Tiles:
    """One token; as many keys a copy as keep the memory busy."""
    kv_tile, kv_chunk = _kv_tile(geometry)
    return Tiles(query_tile=1, kv_tile=kv_tile, kv_chunk=kv_chunk)


def heuristic_prefill_tiles(geometry: AttentionGeometry) -> Tiles:
    """So many tokens that the heads of a unit make PREFILL_ROWS rows; a power of two from 16 to 128."""
    kv_tile, kv_chunk = _kv_tile(geometry)
    tokens = PREFILL_ROWS // layout_of(geometry).unit_q_heads
    query_tile = min(128, max(16, 1 << max(0, tokens.bit_length() - 1)))
    return Tiles(query_tile=query_tile, kv_tile=kv_tile, kv_chunk=kv_chunk)


def checked_tiles(geometry: AttentionGeometry, *, is_decode: bool, **fields: int) -> Tiles:
    """ValueError for tiles that a geometry cannot have: they would cut blocks or lanes, or overflow VMEM."""
    from pallas_kernels.paged_attention.mosaic_tpu.settings import Settings, vmem_bytes  # which imports this file

    tiles = Tiles(**fields)
    is_power = tiles.query_tile >= 16 and tiles.query_tile & (tiles.query_tile - 1) == 0
    if not (tiles.query_tile == 1 if is_decode else is_power):
        wanted = "1 for decodes" if is_decode else "a power of two of at least 16"
        raise ValueError(f"query_tile must be {wanted}, got {tiles.query_tile}")
    if min(fields.values()) < 1 or tiles.kv_tile % geometry.block_size or tiles.kv_tile % tiles.kv_chunk:
        raise ValueError(
            f"kv_tile must be whole blocks of {geometry.block_size} tokens and whole chunks of {tiles.kv_chunk}, "
            f"got {tiles.kv_tile}"
        )
    if tiles.kv_chunk % LANES:
        raise ValueError(f"kv_chunk must be a multiple of {LANES}, got {tiles.kv_chunk}")
    settings = Settings(layout=layout_of(geometry), tiles=tiles, block_size=geometry.block_size, dtype=geometry.dtype)
    if vmem_bytes(settings) > VMEM_BYTES:
        raise ValueError(f"{tiles} take {vmem_bytes(settings)} bytes of VMEM, there are {VMEM_BYTES}")
    return tiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpuTiles:
    """Tiles of decodes and of query tiles; a plan carries them, so that host and device agree."""

    decode: Tiles
    prefill: Tiles

    @classmethod
    def of(cls, geometry: AttentionGeometry) -> "TpuTiles":
        """Those measured on the device at hand, or else the heuristic ones; TunedTilesError for a broken file."""
        sizes = tuned_sizes(geometry)
        check = functools.partial(checked_tiles, geometry)
        decode = tuned_tiles("ragged_decode", sizes, functools.partial(check, is_decode=True))
        prefill = tuned_tiles("ragged_prefill", sizes, functools.partial(check, is_decode=False))
        return cls(
            decode=decode or heuristic_decode_tiles(geometry), prefill=prefill or heuristic_prefill_tiles(geometry)
        )


def tuned_sizes(geometry: AttentionGeometry) -> dict[str, int | str]:
    """What the best tiles depend on: all that the lanes of a slot depend on, and the size of a value."""
    names = ("q_heads", "kv_heads", "head_dim", "block_size", "dtype")
    return {name: getattr(geometry, name) for name in names}


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
