"""The host's work list for the GPU prefill kernel: rows of many query tokens, cut into tiles, longest first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.compat import register_pytree_dataclass
from pallas_kernels.paged_attention.geometry import AttentionGeometry, padded
from pallas_kernels.paged_attention.mosaic_gpu.product import ROWS
from pallas_kernels.paged_attention.mosaic_gpu.tiles import DTYPES, HEAD_DIMS

MAX_DECODE_TOKENS = 16  # rows of up to this many query tokens belong to the decode kernel
MAX_DECODE_BUCKET = 64  # tokens; in steps of up to so many all rows do, and there is no prefill kernel
COMPUTE_WARPGROUPS = 2  # of a thread block, each with a part of its own of the item's tokens
MAX_FOLDED_HEADS = 8  # more would leave a head fewer than 8 of the 64 rows, the unit of a swizzled tile
_ALIGNED = 8  # tokens: a copy into swizzled tiles takes what lies between two multiples of 8 rows, then zeros


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Items of up to `tokens_per_item` neighbouring tokens of the batch; items past the last have no tokens.

    Items begin at multiples of 8 tokens, so the first item of a row may begin with tokens of the row before it: those
    whose position is less than the row's computed length. A row of 70 tokens after 100 computed ones, at token 13 of
    the batch, in items of 32 tokens:

        first_tokens      72     40     8        0
        num_tokens        11     32    32        0
        first_positions  159    127    95        0     the five tokens before 100 are not the row's
        computed_lens    100    100   100        0
    """

    rows: jax.Array  # i32[items]
    first_tokens: jax.Array  # i32[items], index of the first token in the batch
    num_tokens: jax.Array  # i32[items], those before the row's first included; 0: nothing to do
    first_positions: jax.Array  # i32[items], position of the first token, were it the row's: may be negative
    computed_lens: jax.Array  # i32[items], position of the row's first query token


_FIELDS = tuple(field.name for field in dataclasses.fields(PrefillPlan))
register_pytree_dataclass(PrefillPlan, _FIELDS)


def check_prefill_supported(geometry: AttentionGeometry) -> None:
    """NotImplementedError, with the reason, for geometries that this kernel cannot compute."""
    if geometry.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"mosaic_gpu prefill takes a head_dim of {HEAD_DIMS}, got {geometry.head_dim}")
    if geometry.dtype not in DTYPES:
        raise NotImplementedError(f"mosaic_gpu prefill takes bfloat16 or float16, got {geometry.dtype}")
    if geometry.block_size % 8:
        raise NotImplementedError(
            f"mosaic_gpu prefill takes a block_size that is a multiple of 8, got {geometry.block_size}"
        )


def folded_heads(group: int) -> int:
    """Query heads of one KV head that share a tile of 64 rows: the largest power of two up to 8 that divides `group`.

    Short rows then fill their tiles with heads. A group such as 5 or 7 takes tiles of one head and wastes no row in a
    long prompt; 5 heads of 8 tokens would waste 24 rows of each tile, always.

    >>> [folded_heads(group) for group in (1, 2, 4, 5, 6, 8, 16)]
    [1, 2, 4, 1, 2, 8, 8]
    """
    return min(group & -group, MAX_FOLDED_HEADS)


def tokens_per_item(group: int) -> int:
    """Query tokens that one thread block computes, for `folded_heads(group)` heads.

    >>> [tokens_per_item(group) for group in (1, 4, 7, 8, 16)]
    [128, 32, 128, 16, 16]
    """
    return COMPUTE_WARPGROUPS * ROWS // folded_heads(group)


def num_items(*, group: int, num_tokens: int, num_rows: int) -> int:
    """Length of a bucket's work list: all full items that the tokens make, and a partial one for each prefill row.

    >>> num_items(group=4, num_tokens=512, num_rows=8)
    25
    >>> num_items(group=4, num_tokens=128, num_rows=128)
    12
    """
    prefill_rows = min(num_rows, num_tokens // (MAX_DECODE_TOKENS + 1))
    return (num_tokens + prefill_rows * (_ALIGNED - 1)) // tokens_per_item(group) + prefill_rows


def prefill_plan_shapes(*, geometry: AttentionGeometry, num_tokens: int, num_rows: int) -> PrefillPlan:
    """The ShapeDtypeStructs of a bucket's plan."""
    items = num_items(group=geometry.group, num_tokens=num_tokens, num_rows=num_rows)
    # jax types its fields as arrays; here the leaves are their shapes.
    leaves: dict[str, Any] = {name: jax.ShapeDtypeStruct((items,), jnp.int32) for name in _FIELDS}
    return PrefillPlan(**leaves)


def build_prefill_plan(
    query_lens: np.ndarray,  # i32[batch rows], >= 1
    kv_lens: np.ndarray,  # i32[batch rows], computed tokens + query tokens
    starts: np.ndarray,  # i32[batch rows or more], first token of each row in the batch
    *,
    geometry: AttentionGeometry,
    num_tokens: int,
    num_rows: int,
) -> PrefillPlan:
    """The plan of the rows with more than MAX_DECODE_TOKENS query tokens, as numpy arrays of the bucket's shapes.

    Longest first, by the keys that an item sees: the short ones fill the gaps at the end of the launch.
    """
    size = tokens_per_item(geometry.group)
    prefill_rows = np.flatnonzero(query_lens > MAX_DECODE_TOKENS)
    before = starts[: len(query_lens)] % _ALIGNED  # tokens of the rows before, in each row's first item
    counts = -(-(query_lens + before)[prefill_rows] // size)
    rows = np.repeat(prefill_rows, counts)
    offsets = (np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)) * size - before[rows]
    computed = (kv_lens - query_lens)[rows]
    lengths = np.minimum(query_lens[rows] - offsets, size)
    order = np.argsort(-(computed + offsets + lengths), kind="stable")
    items = num_items(group=geometry.group, num_tokens=num_tokens, num_rows=num_rows)
    leaves: dict[str, Any] = {
        "rows": padded(rows[order], items),
        "first_tokens": padded((starts[rows] + offsets)[order], items),
        "num_tokens": padded(lengths[order], items),
        "first_positions": padded((computed + offsets)[order], items),
        "computed_lens": padded(computed[order], items),
    }
    return PrefillPlan(**leaves)
