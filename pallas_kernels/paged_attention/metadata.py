"""What a step's batch looks like to paged attention: built once a step on the host with numpy, shared by all layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import register_pytree_dataclass

QUERY_TILE = 64  # tokens of one sequence that share one walk over its keys
DECODE_GROUP = 16  # decodes (tokens that walk their keys alone) that are computed together
MAX_ALONE_TOKENS = 64  # up to this bucket every token is a decode: half the program, and short prompts gain by it
DECODE_CHUNK = 128  # positions that decodes walk at a time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """A padded batch and the host's plan to compute it.

    Tokens of a row lie side by side, rows in order, padding tokens last:

        row          0 0 0 0 0 | 1 | 2 | 3 3 | -   -
        token        0 1 2 3 4 | 5 | 6 | 7 8 | 9  10
        computed by  tile 0    | decode  | tile 1 | nobody

    A bucket of up to MAX_ALONE_TOKENS tokens has no tiles: each token is a decode of its own, that of a longer row too.
    Shapes depend only on the token and row buckets, the widest block table, and whether there are tiles at all.
    """

    query_starts: jax.Array  # i32[rows + 1], first token of each row; the last entry and padding rows: num tokens
    kv_lens: jax.Array  # i32[rows], tokens of the sequence after this step, 0 for padding rows
    block_tables: jax.Array  # i32[rows, blocks_per_seq], 0 past a sequence's end
    decode_tokens: jax.Array  # i32[decodes], tokens computed alone, by falling length; 0 past num_decodes
    decode_rows: jax.Array  # i32[decodes], the row of each
    decode_lens: jax.Array  # i32[decodes], the positions it sees were there no window, 0 past num_decodes
    num_decodes: jax.Array  # i32[]
    num_common_chunks: jax.Array  # i32[], leading chunks of DECODE_CHUNK positions whose slots all decodes share
    tile_tokens: jax.Array  # i32[tiles], first token of up to QUERY_TILE tokens of one row
    tile_rows: jax.Array  # i32[tiles]
    tile_positions: jax.Array  # i32[tiles], position of the first token in its sequence
    tile_lens: jax.Array  # i32[tiles], tokens in the tile
    num_tiles: jax.Array  # i32[]
    output_rows: jax.Array  # i32[tokens], where a token's result lies in [decodes, one row of zeros, tokens]


_FIELDS = tuple(field.name for field in dataclasses.fields(AttentionMetadata))
register_pytree_dataclass(AttentionMetadata, _FIELDS)


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


def metadata_shapes(
    *, num_tokens: int, num_rows: int, blocks_per_seq: int, has_prefill: bool = True
) -> AttentionMetadata:
    """The ShapeDtypeStructs of a bucket's metadata, for compiling ahead of time.

    With `has_prefill` a step may mix rows of one token and of many. Without it every row has one token, and the step
    compiles without the tile loop.
    """
    decodes, tiles = plan_sizes(num_tokens=num_tokens, num_rows=num_rows, has_prefill=has_prefill)
    shapes: dict[str, tuple[int, ...]] = {
        "query_starts": (num_rows + 1,),
        "kv_lens": (num_rows,),
        "block_tables": (num_rows, blocks_per_seq),
        "num_decodes": (),
        "num_common_chunks": (),
        "num_tiles": (),
        "output_rows": (num_tokens,),
    }
    shapes |= {name: (decodes,) for name in _FIELDS if name.startswith("decode_")}
    shapes |= {name: (tiles,) for name in _FIELDS if name.startswith("tile_")}
    # jax types its fields as arrays; here the leaves are their shapes.
    leaves: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    return AttentionMetadata(**leaves)


def build_metadata(
    query_lens: Sequence[int] | np.ndarray,  # [batch rows], new tokens of each row, >= 1
    kv_lens: Sequence[int] | np.ndarray,  # [batch rows], computed tokens + new tokens
    block_tables: np.ndarray,  # i32[batch rows, blocks_per_seq]; the width is part of the compiled shape
    *,
    block_size: int,
    num_tokens: int,
    num_rows: int,
    has_prefill: bool = True,
) -> AttentionMetadata:
    """Builds a step's metadata as numpy arrays of the shapes that `metadata_shapes` gives for the bucket.

    The bucket is (num_tokens, num_rows); ValueError if the batch does not fit it.
    """
    query_lens, kv_lens = np.asarray(query_lens, np.int32), np.asarray(kv_lens, np.int32)
    _check_batch(query_lens, kv_lens, block_tables, block_size)
    _check_fits(query_lens, num_tokens, num_rows, has_prefill)
    starts = np.full(num_rows + 1, query_lens.sum(), np.int32)
    starts[0] = 0
    np.cumsum(query_lens, out=starts[1 : len(query_lens) + 1])
    tables = np.zeros((num_rows, block_tables.shape[1]), np.int32)
    tables[: len(block_tables)] = block_tables

    decodes, tiles = plan_sizes(num_tokens=num_tokens, num_rows=num_rows, has_prefill=has_prefill)
    alone = query_lens if tiles == 0 else query_lens * (query_lens == 1)  # each row's tokens that are decodes
    decode_rows, index = _counted(alone)
    decode_lens = (kv_lens - query_lens)[decode_rows] + index + 1
    longest_first = np.argsort(-decode_lens, kind="stable")
    decode_tokens = (starts[decode_rows] + index)[longest_first]
    tile_rows, first_queries = _tiles(query_lens) if tiles else (decode_rows[:0], decode_rows[:0])
    tile_lens = np.minimum(query_lens[tile_rows] - first_queries, QUERY_TILE)
    tile_starts = starts[tile_rows] + first_queries

    output_rows = np.arange(decodes + 1, decodes + 1 + num_tokens, dtype=np.int32)
    output_rows[starts[-1] :] = decodes  # padding
    output_rows[decode_tokens] = np.arange(len(decode_tokens))

    leaves: dict[str, Any] = {
        "query_starts": starts,
        "kv_lens": _padded(kv_lens, num_rows),
        "block_tables": tables,
        "decode_tokens": _padded(decode_tokens, decodes),
        "decode_rows": _padded(decode_rows[longest_first], decodes),
        "decode_lens": _padded(decode_lens[longest_first], decodes),
        "num_decodes": np.asarray(len(decode_tokens), np.int32),
        "num_common_chunks": _num_common_chunks(block_tables, decode_rows, decode_lens, block_size),
        "tile_tokens": _padded(tile_starts, tiles),
        "tile_rows": _padded(tile_rows, tiles),
        "tile_positions": _padded((kv_lens - query_lens)[tile_rows] + first_queries, tiles),
        "tile_lens": _padded(tile_lens, tiles),
        "num_tiles": np.asarray(len(tile_rows), np.int32),
        "output_rows": output_rows,
    }
    return AttentionMetadata(**leaves)


def _num_common_chunks(
    block_tables: np.ndarray, decode_rows: np.ndarray, decode_lens: np.ndarray, block_size: int
) -> np.ndarray:
    """How many whole chunks all decodes begin with in the same blocks; each keeps a position of its own after them."""
    if len(decode_rows) < 2:
        return np.zeros((), np.int32)
    limit = int(decode_lens.min()) - 1
    tables = block_tables[decode_rows, : limit // block_size]
    differs = (tables != tables[0]).any(0)
    num_blocks = int(differs.argmax()) if differs.any() else tables.shape[1]
    return np.asarray(num_blocks * block_size // DECODE_CHUNK, np.int32)


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


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros(length, np.int32)
    padded[: len(values)] = values
    return padded


def _check_batch(query_lens: np.ndarray, kv_lens: np.ndarray, block_tables: np.ndarray, block_size: int) -> None:
    if kv_lens.shape != query_lens.shape or block_tables.ndim != 2 or len(block_tables) != len(query_lens):
        raise ValueError(
            f"query_lens, kv_lens and block_tables must agree on the rows, got {query_lens.shape}, {kv_lens.shape} "
            f"and {block_tables.shape}"
        )
    if len(query_lens) == 0:
        return
    if query_lens.min() < 1 or np.any(kv_lens < query_lens):
        raise ValueError(f"each row needs 1 <= query_len <= kv_len, got {query_lens} and {kv_lens}")
    if kv_lens.max() > block_tables.shape[1] * block_size:
        raise ValueError(
            f"a row of {kv_lens.max()} tokens needs more than the {block_tables.shape[1]} blocks of {block_size} "
            "tokens that its block table holds"
        )


def _check_fits(query_lens: np.ndarray, num_tokens: int, num_rows: int, has_prefill: bool) -> None:
    if len(query_lens) > num_rows or query_lens.sum() > num_tokens:
        raise ValueError(
            f"{len(query_lens)} rows of {query_lens.sum()} tokens do not fit the bucket of {num_rows} rows and "
            f"{num_tokens} tokens"
        )
    if not has_prefill and np.any(query_lens > 1):
        raise ValueError("a row of several tokens needs metadata with has_prefill=True")
