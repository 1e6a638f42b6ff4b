"""The host's work list for the XLA kernel: which tokens walk their keys alone, and which in tiles."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import register_pytree_dataclass
from pallas_kernels.paged_attention.geometry import AttentionGeometry, padded

QUERY_TILE = 64  # tokens of one sequence that share one walk over its keys
DECODE_GROUP = 16  # decodes (tokens that walk their keys alone) that are computed together
MAX_ALONE_TOKENS = 64  # up to this bucket every token is a decode: half the program, and short prompts gain by it
CHUNK = 128  # positions that are walked at a time; a power of two


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class XlaPlan:
    """Decodes are tokens computed alone, tiles are runs of tokens of one row:

        row          0 0 0 0 0 | 1 | 2 | 3 3 | -   -
        token        0 1 2 3 4 | 5 | 6 | 7 8 | 9  10
        computed by  tile 0    | decode  | tile 1 | nobody

    A bucket of up to MAX_ALONE_TOKENS tokens has no tiles: each token is a decode of its own, that of a longer row too.
    """

    decode_tokens: jax.Array  # i32[decodes], tokens computed alone, by falling length; 0 past num_decodes
    decode_rows: jax.Array  # i32[decodes], the row of each
    decode_lens: jax.Array  # i32[decodes], the positions it sees were there no window, 0 past num_decodes
    num_decodes: jax.Array  # i32[]
    num_common_chunks: jax.Array  # i32[], leading chunks that all tokens see whole, and in the same slots
    tile_tokens: jax.Array  # i32[tiles], first token of up to QUERY_TILE tokens of one row
    tile_rows: jax.Array  # i32[tiles]
    tile_positions: jax.Array  # i32[tiles], position of the first token in its sequence
    tile_lens: jax.Array  # i32[tiles], tokens in the tile
    num_tiles: jax.Array  # i32[]
    output_rows: jax.Array  # i32[tokens], where a token's result lies in [decodes, one row of zeros, tokens]


_FIELDS = tuple(field.name for field in dataclasses.fields(XlaPlan))
register_pytree_dataclass(XlaPlan, _FIELDS)


def check_supported(geometry: AttentionGeometry) -> None:
    """Any geometry runs in XLA."""


def plan_sizes(*, num_tokens: int, num_rows: int, has_prefill: bool) -> tuple[int, int]:
    """Lengths of the decode plan and the tile plan of a bucket.

    Decodes: rows, in whole groups. Tiles: every full tile that the tokens make, and one partial tile a row.

    >>> plan_sizes(num_tokens=512, num_rows=8, has_prefill=True)
    (8, 16)
    >>> plan_sizes(num_tokens=32, num_rows=17, has_prefill=False)
    (32, 0)
    >>> plan_sizes(num_tokens=8, num_rows=4, has_prefill=True)
    (8, 0)
    """
    if has_prefill and num_tokens <= MAX_ALONE_TOKENS:
        return _in_groups(num_tokens), 0
    return _in_groups(num_rows), min(num_tokens // QUERY_TILE + num_rows, num_tokens // 2) if has_prefill else 0


def _in_groups(count: int) -> int:
    return count if count < DECODE_GROUP else -(-count // DECODE_GROUP) * DECODE_GROUP


def plan_shapes(
    *, geometry: AttentionGeometry, num_tokens: int, num_rows: int, blocks_per_seq: int, has_prefill: bool
) -> XlaPlan:
    """The ShapeDtypeStructs of a bucket's plan; neither the geometry nor the tables matter."""
    del geometry, blocks_per_seq
    decodes, tiles = plan_sizes(num_tokens=num_tokens, num_rows=num_rows, has_prefill=has_prefill)
    shapes: dict[str, tuple[int, ...]] = {name: () for name in _FIELDS if name.startswith("num_")}
    shapes |= {name: (decodes,) for name in _FIELDS if name.startswith("decode_")}
    shapes |= {name: (tiles,) for name in _FIELDS if name.startswith("tile_")}
    shapes |= {"output_rows": (num_tokens,)}
    # jax types its fields as arrays; here the leaves are their shapes.
    leaves: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    return XlaPlan(**leaves)


def build_plan(
    query_lens: np.ndarray,  # i32[batch rows]
    kv_lens: np.ndarray,  # i32[batch rows]
    block_tables: np.ndarray,  # i32[batch rows, as many columns as the longest row fills, or more]
    *,
    geometry: AttentionGeometry,
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool,
) -> XlaPlan:
    """The plan of a batch that fits the bucket, as numpy arrays of the shapes that `plan_shapes` gives."""
    del blocks_per_seq
    starts = np.zeros(len(query_lens) + 1, np.int32)
    np.cumsum(query_lens, out=starts[1:])
    decodes, tiles = plan_sizes(num_tokens=num_tokens, num_rows=num_rows, has_prefill=has_prefill)
    alone = query_lens if tiles == 0 else query_lens * (query_lens == 1)  # each row's tokens that are decodes
    decode_rows, index = _counted(alone)
    decode_lens = (kv_lens - query_lens)[decode_rows] + index + 1
    longest_first = np.argsort(-decode_lens, kind="stable")
    decode_tokens = (starts[decode_rows] + index)[longest_first]
    tile_rows, first_queries = _tiles(query_lens) if tiles else (decode_rows[:0], decode_rows[:0])
    tile_lens = np.minimum(query_lens[tile_rows] - first_queries, QUERY_TILE)

    output_rows = np.arange(decodes + 1, decodes + 1 + num_tokens, dtype=np.int32)
    output_rows[starts[-1] :] = decodes  # padding
    output_rows[decode_tokens] = np.arange(len(decode_tokens))

    leaves: dict[str, Any] = {
        "decode_tokens": padded(decode_tokens, decodes),
        "decode_rows": padded(decode_rows[longest_first], decodes),
        "decode_lens": padded(decode_lens[longest_first], decodes),
        "num_decodes": np.asarray(len(decode_tokens), np.int32),
        "num_common_chunks": _num_common_chunks(block_tables, query_lens, kv_lens, geometry.block_size),
        "tile_tokens": padded(starts[tile_rows] + first_queries, tiles),
        "tile_rows": padded(tile_rows, tiles),
        "tile_positions": padded((kv_lens - query_lens)[tile_rows] + first_queries, tiles),
        "tile_lens": padded(tile_lens, tiles),
        "num_tiles": np.asarray(len(tile_rows), np.int32),
        "output_rows": output_rows,
    }
    return XlaPlan(**leaves)


def _num_common_chunks(
    block_tables: np.ndarray, query_lens: np.ndarray, kv_lens: np.ndarray, block_size: int
) -> np.ndarray:
    """How many whole chunks all rows begin with in the same blocks, all of them before this step's tokens."""
    if query_lens.sum() < 2:
        return np.zeros((), np.int32)
    tables = block_tables[:, : int((kv_lens - query_lens).min()) // block_size]
    differs = (tables != tables[0]).any(0)
    num_blocks = int(differs.argmax()) if differs.any() else tables.shape[1]
    return np.asarray(num_blocks * block_size // CHUNK, np.int32)


def _tiles(query_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of more than one token, cut into tiles: the row of each tile and the first query it covers."""
    rows = np.flatnonzero(query_lens > 1)
    owners, index = _counted(-(-query_lens[rows] // QUERY_TILE))
    return rows[owners], index * QUERY_TILE


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which item each element belongs to, and its index in it: counts [2, 3] give [0, 0, 1, 1, 1], [0, 1, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) - firsts[owners]
