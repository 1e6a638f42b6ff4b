"""Tile sizes of the GPU kernels by head dimension, and the sizes of models that the kernels take."""

import dataclasses
import functools

from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.tuned_tiles import tuned_tiles

SHARED_MEMORY_BYTES = 232_448  # that one thread block of an H100 may have
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 192, 256)  # of which a tile holds several, or which hold several tiles
DTYPES = ("bfloat16", "float16")
MAX_GROUP = 16  # query heads a KV head
_ROWS = 64  # of a tile of queries, as product.ROWS
_BARRIER_BYTES = 2048  # and row sums: more than there are


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTiles:
    """How the decode kernel walks keys."""

    kv_tile: int  # keys a step: 64 or 128
    stages: int  # steps whose K and V are in shared memory or on their way
    query_stages: int = 2  # query tiles; with one, no keys of the next item are on their way at an item's end

    def __post_init__(self) -> None:
        if self.kv_tile not in (64, 128) or self.stages < 2 or self.query_stages < 1:
            raise ValueError(f"kv_tile must be 64 or 128, stages at least 2 and query_stages at least 1, got {self}")


# Measured at 128 alone (H100, 2026-11-26): 3 stages are 1 to 2 % faster than 4, and 5 are 5 % slower. The others keep
# as many bytes on their way, 96 KiB; 3 TB/s at 0.7 us ask for 16. One thread block fits a multiprocessor: registers.
_DECODE = {
    64: DecodeTiles(kv_tile=64, stages=6),
    80: DecodeTiles(kv_tile=64, stages=5),
    96: DecodeTiles(kv_tile=64, stages=4),
    128: DecodeTiles(kv_tile=64, stages=3),
    256: DecodeTiles(kv_tile=64, stages=2, query_stages=1),
}


def heuristic_decode_tiles(head_dim: int) -> DecodeTiles:
    """The tiles where none were measured; both 16-bit types take the same."""
    return _DECODE[head_dim]


def checked_decode_tiles(geometry: AttentionGeometry, **fields: int) -> DecodeTiles:
    """ValueError for tiles that a geometry cannot have: they would cut a block, or overflow shared memory."""
    tiles = DecodeTiles(**fields)
    if tiles.kv_tile % geometry.block_size and geometry.block_size % tiles.kv_tile:
        raise ValueError(
            f"kv_tile must be whole blocks of {geometry.block_size} tokens or a part of one, got {tiles.kv_tile}"
        )
    keys = 2 * tiles.stages * tiles.kv_tile * geometry.head_dim * 2
    queries = (tiles.query_stages * 2 + 4) * _ROWS * geometry.head_dim  # and results, in float32
    _check_shared_memory(keys + queries + _BARRIER_BYTES, tiles)
    return tiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillTiles:
    """How the prefill kernel walks keys."""

    block_kv: int  # keys of a tile
    stages: int  # tiles of K, and of V, in shared memory

    def __post_init__(self) -> None:
        if self.block_kv % 64 or self.stages < 2:
            raise ValueError(
                f"block_kv must be a multiple of 64 and stages at least 2, got {self.block_kv} and {self.stages}"
            )


def heuristic_prefill_tiles(head_dim: int) -> PrefillTiles:
    """Tiles that fit shared memory (227 KiB) and registers; those of 64 and 128 are FlashAttention-3's on H100."""
    if head_dim > 128:
        return PrefillTiles(block_kv=64, stages=2)
    return PrefillTiles(block_kv=128, stages=2 if head_dim > 96 else 3)


def checked_prefill_tiles(geometry: AttentionGeometry, **fields: int) -> PrefillTiles:
    """ValueError for tiles that a geometry cannot have: more keys than one product takes, or than memory holds."""
    tiles = PrefillTiles(**fields)
    if tiles.block_kv > 256:
        raise ValueError(f"block_kv must be at most 256, got {tiles.block_kv}")
    keys = 2 * tiles.stages * tiles.block_kv * geometry.head_dim * 2
    queries = 2 * _ROWS * geometry.head_dim * 2
    results = 2 * _ROWS * -(-geometry.head_dim // 64) * 64 * 2 if geometry.head_dim % 64 else 0  # else in their place
    _check_shared_memory(keys + queries + results + _BARRIER_BYTES, tiles)
    return tiles


def _check_shared_memory(num_bytes: int, tiles: object) -> None:
    if num_bytes > SHARED_MEMORY_BYTES:
        raise ValueError(f"{tiles} take {num_bytes} bytes of shared memory, there are {SHARED_MEMORY_BYTES}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuTiles:
    """Tiles of both kernels; a plan carries them, so that host and device agree."""

    decode: DecodeTiles
    prefill: PrefillTiles

    @classmethod
    def of(cls, geometry: AttentionGeometry) -> "GpuTiles":
        """Those measured on the device at hand, or else the heuristic ones; TunedTilesError for a broken file."""
        sizes = tuned_sizes(geometry)
        decode = tuned_tiles("paged_decode", sizes, functools.partial(checked_decode_tiles, geometry))
        prefill = tuned_tiles("paged_prefill", sizes, functools.partial(checked_prefill_tiles, geometry))
        return cls(
            decode=decode or heuristic_decode_tiles(geometry.head_dim),
            prefill=prefill or heuristic_prefill_tiles(geometry.head_dim),
        )


def tuned_sizes(geometry: AttentionGeometry) -> dict[str, int | str]:
    """What the best tiles depend on: not on how many KV heads share a device's work, nor on which 16-bit type."""
    return {"head_dim": geometry.head_dim, "block_size": geometry.block_size, "group": geometry.group}
