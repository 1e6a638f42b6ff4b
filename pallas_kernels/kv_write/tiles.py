"""How many tokens a thread block of the GPU's kv_write copies."""

import dataclasses
import functools

from pallas_kernels.tuned_tiles import tuned_tiles

MAX_TOKENS = 64  # each is a copy that one thread starts
_TILE_BYTES = 8192  # of K, and as much of V: a dozen thread blocks fit a multiprocessor's shared memory
_HEURISTIC_TOKENS = 16
_SHARED_MEMORY_BYTES = 227 << 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WriteTiles:
    """Sizes of a tile."""

    tokens: int  # a power of two; fewer where the batch is no multiple of them

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_TOKENS or self.tokens & (self.tokens - 1):
            raise ValueError(f"tokens must be a power of two up to {MAX_TOKENS}, got {self.tokens}")


def write_tiles(row_bytes: int) -> WriteTiles:
    """Tiles for tokens whose K takes `row_bytes`: measured on the device at hand, or else heuristic."""
    make = functools.partial(checked_write_tiles, row_bytes)
    return tuned_tiles("kv_write", tuned_sizes(row_bytes), make) or heuristic_write_tiles(row_bytes)


def tuned_sizes(row_bytes: int) -> dict[str, int | str]:
    """What the best tiles depend on."""
    return {"row_bytes": row_bytes}


def checked_write_tiles(row_bytes: int, **fields: int) -> WriteTiles:
    """ValueError for tiles that overflow shared memory."""
    tiles = WriteTiles(**fields)
    if 2 * tiles.tokens * row_bytes > _SHARED_MEMORY_BYTES:
        raise ValueError(
            f"{tiles.tokens} tokens of {row_bytes} bytes, K and V, overflow the {_SHARED_MEMORY_BYTES} bytes of shared "
            "memory"
        )
    return tiles


def heuristic_write_tiles(row_bytes: int) -> WriteTiles:
    """As many tokens as leave room for other thread blocks.

    >>> [heuristic_write_tiles(row_bytes).tokens for row_bytes in (256, 2048, 65536)]
    [16, 4, 1]
    """
    fitting = max(min(_TILE_BYTES // row_bytes, _HEURISTIC_TOKENS), 1)
    return WriteTiles(tokens=1 << (fitting.bit_length() - 1))
