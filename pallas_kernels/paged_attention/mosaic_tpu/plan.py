"""The host's work list for the TPU kernel: which runs of tokens share a walk over their keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import register_pytree_dataclass
from pallas_kernels.paged_attention.geometry import AttentionGeometry, padded
from pallas_kernels.paged_attention.mosaic_tpu.tiles import TpuTiles


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkList:
    """Items are runs of consecutive tokens of one row; entries past `num_items` are zeros."""

    rows: jax.Array  # i32[items]
    tokens: jax.Array  # i32[items], the first token
    positions: jax.Array  # i32[items], its position in the sequence
    lens: jax.Array  # i32[items], tokens of the item
    num_items: jax.Array  # i32[1]


register_pytree_dataclass(WorkList, tuple(field.name for field in dataclasses.fields(WorkList)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TpuPlan:
    """Rows of one token are decodes; rows of more are cut into query tiles.

    row    0 | 1 | 2 2 2 2 2 | 3 3 | -
    token  0 | 1 | 2 3 4 5 6 | 7 8 | 9      query tile of 4 tokens
    item   decodes | tiles 0, 1  | tile 2 | nobody
    """

    decodes: WorkList
    tiles: WorkList | None  # None: the bucket takes rows of one token only
    geometry: AttentionGeometry  # static: lanes alone do not tell how many KV heads they hold
    sizes: TpuTiles  # static


jax.tree_util.register_dataclass(TpuPlan, data_fields=["decodes", "tiles"], meta_fields=["geometry", "sizes"])


def plan_sizes(*, query_tile: int, num_tokens: int, num_rows: int) -> tuple[int, int]:
    """Longest decode and tile lists of a bucket: every full tile that the tokens make, and one partial tile a row.

    >>> plan_sizes(query_tile=64, num_tokens=512, num_rows=8)
    (8, 16)
    >>> plan_sizes(query_tile=64, num_tokens=4, num_rows=16)
    (4, 2)
    """
    return min(num_rows, num_tokens), min(num_tokens // query_tile + num_rows, num_tokens // 2)


def plan_shapes(
    *, geometry: AttentionGeometry, num_tokens: int, num_rows: int, blocks_per_seq: int, has_prefill: bool
) -> TpuPlan:
    """The ShapeDtypeStructs of a bucket's plan; the width of the tables does not matter."""
    del blocks_per_seq
    sizes = TpuTiles.of(geometry)
    lengths = _lengths(sizes, num_tokens, num_rows)
    decodes, query_tiles = (_work_list(lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32), n) for n in lengths)
    return TpuPlan(decodes=decodes, tiles=query_tiles if has_prefill else None, geometry=geometry, sizes=sizes)


def build_plan(
    query_lens: np.ndarray,  # i32[batch rows]
    kv_lens: np.ndarray,  # i32[batch rows]
    block_tables: np.ndarray,
    *,
    geometry: AttentionGeometry,
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool,
    tiles: TpuTiles | None = None,  # by default TpuTiles.of(geometry)
) -> TpuPlan:
    """The plan of a batch that fits the bucket, as numpy arrays of the shapes that `plan_shapes` gives."""
    del block_tables, blocks_per_seq
    sizes = tiles or TpuTiles.of(geometry)
    num_decodes, num_tiles = _lengths(sizes, num_tokens, num_rows)
    starts = np.cumsum(query_lens) - query_lens
    computed = kv_lens - query_lens
    alone = np.flatnonzero(query_lens == 1)
    decodes = _filled(num_decodes, alone, starts[alone], computed[alone], np.ones_like(alone))
    if not has_prefill:
        return TpuPlan(decodes=decodes, tiles=None, geometry=geometry, sizes=sizes)
    tile = sizes.prefill.query_tile
    rows = np.flatnonzero(query_lens > 1)
    counts = -(-query_lens[rows] // tile)
    owners = np.repeat(rows, counts)
    first = (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile
    lens = np.minimum(query_lens[owners] - first, tile)
    query_tiles = _filled(num_tiles, owners, starts[owners] + first, computed[owners] + first, lens)
    return TpuPlan(decodes=decodes, tiles=query_tiles, geometry=geometry, sizes=sizes)


def _lengths(sizes: TpuTiles, num_tokens: int, num_rows: int) -> tuple[int, int]:
    lengths = plan_sizes(query_tile=sizes.prefill.query_tile, num_tokens=num_tokens, num_rows=num_rows)
    return max(1, lengths[0]), max(1, lengths[1])  # a kernel takes no empty arrays


def _work_list(make: Any, size: int) -> WorkList:
    names = ("rows", "tokens", "positions", "lens")
    return WorkList(**{name: make((size,)) for name in names}, num_items=make((1,)))


def _filled(size: int, rows: np.ndarray, tokens: np.ndarray, positions: np.ndarray, lens: np.ndarray) -> WorkList:
    # jax types its fields as arrays; here the leaves are numpy's, until the step is called.
    leaves: dict[str, Any] = {
        "rows": padded(rows, size),
        "tokens": padded(tokens, size),
        "positions": padded(positions, size),
        "lens": padded(lens, size),
        "num_items": np.asarray([len(rows)], np.int32),
    }
    return WorkList(**leaves)
