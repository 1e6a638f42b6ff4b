"""The work list of a decode step: which query tokens meet which keys in which thread block, planned on the host."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import num_multiprocessors
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_gpu.product import ROWS

MIN_CHUNK = 128  # keys; a shorter item would cost more in partial results and their merge than it reads
_ITEMS_PER_SM = 2  # so that the last round, which need not be full, is half of the work at most
H100_SMS = 132  # of an SXM module; of an H200 and a GH200 too


class Item(enum.IntEnum):
    """Columns of `DecodePlan.items`: one sector of memory, which is all that a thread block must read to begin."""

    ROW = 0  # of the block table
    TOKEN = 1  # first query token
    NUM_TOKENS = 2
    POSITION = 3  # of the first query token in its sequence
    KV_LO = 4  # a multiple of MIN_CHUNK
    KV_HI = 5  # KV_LO: no key, the tokens are padding and get zeros
    PARTIAL = 6  # where the partial result goes; `num_partials`: the item has all keys and writes the result
    NUM_ITEMS = 7  # of the plan, the same in all rows; those after them mean nothing else


class Merge(enum.IntEnum):
    """Columns of `DecodePlan.merges`."""

    TOKEN = 0
    NUM_TOKENS = 1  # 0: nothing to do
    FIRST = 2  # partial
    COUNT = 3  # partials, side by side


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Items of one sliding window, longest first, and the merges of those query tiles that several items share.

    A query tile is up to `tokens_per_tile` tokens of one row; an item is a query tile and a range of keys:

        row, tokens   0 | 1 1 1 | 2                       keys   0    128   256   384
        query tile    0 |   1   | 2      tile 2 in chunks of 128   item 2 item 3 item 4  -> merge 0 of partials 0, 1, 2
    """

    items: jax.Array  # i32[items, 8], see Item
    merges: jax.Array  # i32[merges, 4], see Merge; empty merges at the end
    tokens_per_tile: int  # static
    num_partials: int  # static
    num_sms: int  # static, of the device that was planned for


jax.tree_util.register_dataclass(
    DecodePlan,
    data_fields=["items", "merges"],
    meta_fields=["tokens_per_tile", "num_partials", "num_sms"],
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSizes:
    """Sizes that depend on the bucket alone."""

    tokens_per_tile: int
    tiles: int  # at most, those of padding tokens included
    budget: int  # items that keep the device busy
    items: int
    partials: int
    num_sms: int

    @property
    def merges(self) -> int:
        """A merge has two partials at least, and is the only one of its tile."""
        return min(self.partials // 2, self.tiles)


def rows_per_token(group: int) -> int:
    """Rows of a query tile that a token takes: its query heads, padded to whole swizzle tiles of 8 rows."""
    return 8 if group <= 8 else 16


def rows_between_heads(group: int) -> int:
    """Rows of the queries in memory from one KV head's to the next one's: `group`, or that many padded.

    A copy into swizzled tiles brings what lies between two multiples of 8 rows, and zeros for the rest of its box; so
    a KV head's queries must not reach over such a multiple, and 8 or more of them must begin at one.

    >>> [rows_between_heads(group) for group in (1, 2, 3, 4, 7, 8, 12, 16)]
    [1, 2, 8, 4, 8, 8, 16, 16]
    """
    padded = rows_per_token(group)
    return group if padded % group == 0 and (group <= 8 or group == padded) else padded


def decode_sizes(
    *,
    geometry: AttentionGeometry,
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool,
    num_sms: int | None = None,  # by default those of the GPU at hand, and without one, an H100's
) -> DecodeSizes:
    """Sizes of a bucket's plan, the same for the same arguments on the same kind of device.

    Of n query tiles at most max(budget, n + budget / 2) items are made. So split tiles have at most `budget` items
    together: with s split and u whole tiles, of i and u items, i >= 2 s, and i + u <= budget or i + u <= s + u +
    budget / 2, where i - s >= i / 2.
    """
    num_sms = num_sms or num_multiprocessors() or H100_SMS
    per_tile = min(ROWS // rows_per_token(geometry.group), num_tokens) if has_prefill else 1
    tiles = min(num_tokens, num_tokens // per_tile + num_rows + 1)  # a partial tile for each row, and for the padding
    budget = max(_ITEMS_PER_SM * num_sms // geometry.kv_heads, 1)
    can_split = budget > 1 and blocks_per_seq * geometry.block_size > MIN_CHUNK
    return DecodeSizes(
        tokens_per_tile=per_tile,
        tiles=tiles,
        budget=budget,
        items=tiles + (budget if can_split else 0),
        partials=budget if can_split else 0,
        num_sms=num_sms,
    )


def decode_plan_shapes(*, geometry: AttentionGeometry, sizes: DecodeSizes) -> tuple[DecodePlan, ...]:
    """ShapeDtypeStructs of a plan for each of the geometry's windows."""
    shapes = {"items": (sizes.items, 8), "merges": (sizes.merges, 4)}
    plan = _plan({name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}, sizes)
    return (plan,) * len(geometry.sliding_windows)


def build_decode_plan(
    query_lens: Sequence[int] | np.ndarray,  # [batch rows], >= 1
    kv_lens: Sequence[int] | np.ndarray,  # [batch rows]
    *,
    geometry: AttentionGeometry,
    sizes: DecodeSizes,
    num_tokens: int,
    rows: np.ndarray | None = None,  # those to plan, by default all; padding tokens are planned in any case
) -> tuple[DecodePlan, ...]:
    """A plan of numpy arrays for each of the geometry's windows, equal for equal arguments.

    Items are made as FlashInfer plans its decodes (Ye et al. 2025, arXiv:2501.01005): all chunks have one length, the
    shortest that keeps their number within what fills the device.
    """
    query_lens, kv_lens = np.asarray(query_lens, np.int32), np.asarray(kv_lens, np.int32)
    tiles = _query_tiles(query_lens, kv_lens, np.arange(len(query_lens)) if rows is None else rows, sizes)
    padding = _padding(int(query_lens.sum()), num_tokens, sizes)
    return tuple(_plan_window(tiles, padding, window, sizes) for window in geometry.sliding_windows)


def _query_tiles(query_lens: np.ndarray, kv_lens: np.ndarray, rows: np.ndarray, sizes: DecodeSizes) -> np.ndarray:
    """i32[tiles, 8]: items of all keys, in order of tokens."""
    starts = (np.cumsum(query_lens, dtype=np.int32) - query_lens)[rows]
    lens, positions = query_lens[rows], (kv_lens - query_lens)[rows]
    owners, index = _counted(-(-lens // sizes.tokens_per_tile))
    first = index * sizes.tokens_per_tile
    tiles = np.zeros((len(owners), 8), np.int32)
    tiles[:, Item.ROW] = rows[owners]
    tiles[:, Item.TOKEN] = starts[owners] + first
    tiles[:, Item.NUM_TOKENS] = np.minimum(lens[owners] - first, sizes.tokens_per_tile)
    tiles[:, Item.POSITION] = positions[owners] + first
    tiles[:, Item.KV_HI] = tiles[:, Item.POSITION] + tiles[:, Item.NUM_TOKENS]
    tiles[:, Item.PARTIAL] = sizes.partials
    return tiles


def _padding(first: int, num_tokens: int, sizes: DecodeSizes) -> np.ndarray:
    """i32[tiles, 8]: items without keys for the tokens from `first` on."""
    tokens = np.arange(first, num_tokens, sizes.tokens_per_tile, dtype=np.int32)
    tiles = np.zeros((len(tokens), 8), np.int32)
    tiles[:, Item.TOKEN] = tokens
    tiles[:, Item.NUM_TOKENS] = np.minimum(num_tokens - tokens, sizes.tokens_per_tile)
    tiles[:, Item.PARTIAL] = sizes.partials
    return tiles


def _plan_window(tiles: np.ndarray, padding: np.ndarray, window: int | None, sizes: DecodeSizes) -> DecodePlan:
    lo = np.zeros(len(tiles), np.int32)
    if window is not None:
        lo = np.maximum(tiles[:, Item.POSITION] - (window - 1), 0) // MIN_CHUNK * MIN_CHUNK
    units = -(-(tiles[:, Item.KV_HI] - lo) // MIN_CHUNK)
    limit = max(sizes.budget, len(tiles) + sizes.budget // 2) if sizes.partials else len(tiles)
    chunk = _shortest_chunk(units, limit)
    counts = -(-units // chunk)
    owners, index = _counted(counts)
    work = tiles[owners]
    work[:, Item.KV_LO] = lo[owners] + index * (chunk * MIN_CHUNK)
    work[:, Item.KV_HI] = np.minimum(work[:, Item.KV_LO] + chunk * MIN_CHUNK, work[:, Item.KV_HI])
    is_split = counts > 1
    in_split = np.flatnonzero(is_split[owners])
    work[in_split, Item.PARTIAL] = np.arange(len(in_split))
    longest_first = np.argsort(work[:, Item.KV_LO] - work[:, Item.KV_HI], kind="stable")

    items = np.zeros((sizes.items, 8), np.int32)
    items[: len(work)] = work[longest_first]
    items[len(work) : len(work) + len(padding)] = padding
    items[:, Item.NUM_ITEMS] = len(work) + len(padding)
    merges = np.zeros((sizes.merges, 4), np.int32)
    parts = counts[is_split]
    used = merges[: len(parts)]
    used[:, Merge.TOKEN], used[:, Merge.NUM_TOKENS] = tiles[is_split][:, (Item.TOKEN, Item.NUM_TOKENS)].T
    used[:, Merge.FIRST], used[:, Merge.COUNT] = np.cumsum(parts) - parts, parts
    return _plan({"items": items, "merges": merges}, sizes)


def _plan(leaves: dict[str, Any], sizes: DecodeSizes) -> DecodePlan:
    return DecodePlan(
        **leaves, tokens_per_tile=sizes.tokens_per_tile, num_partials=sizes.partials, num_sms=sizes.num_sms
    )


def _shortest_chunk(units: np.ndarray, limit: int) -> int:
    """The least chunk, in MIN_CHUNK keys, of which all tiles together need at most `limit`."""
    low, high = 1, max(int(units.max(initial=1)), 1)
    while low < high:
        middle = (low + high) // 2
        if int((-(-units // middle)).sum()) <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which item each element belongs to, and its index in it: counts [2, 3] give [0, 0, 1, 1, 1], [0, 1, 0, 1, 2]."""
    owners = np.repeat(np.arange(len(counts)), counts)
    firsts = np.cumsum(counts) - counts
    return owners, np.arange(len(owners)) - firsts[owners]
