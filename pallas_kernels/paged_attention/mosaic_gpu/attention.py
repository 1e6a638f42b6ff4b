"""Paged attention on Hopper GPUs: rows of few query tokens by the decode kernel, the others by the prefill kernel."""

import dataclasses
from typing import Any

import jax
import numpy as np

from pallas_kernels.compat import cuda_runtime_version
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.metadata import AttentionMetadata
from pallas_kernels.paged_attention.mosaic_gpu.decode import paged_decode
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import (
    DecodePlan,
    DecodeSizes,
    build_decode_plan,
    decode_plan_shapes,
    decode_sizes,
)
from pallas_kernels.paged_attention.mosaic_gpu.prefill import check_prefill_supported, prefill
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import (
    MAX_DECODE_BUCKET,
    MAX_DECODE_TOKENS,
    PrefillPlan,
    build_prefill_plan,
    prefill_plan_shapes,
)
from pallas_kernels.paged_attention.mosaic_gpu.tiles import BLOCK_SIZES, DTYPES, HEAD_DIMS, MAX_GROUP, GpuTiles

# Their ptxas miscompiles causal masks: jax's own attention kernel refuses the same range. The runtime's number knows no
# updates, so 12.9.1, where that is mended, cannot be told from 12.9.0.
_BROKEN_CUDA = range(12080, 12091)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """Work lists of a step, shared by its layers."""

    decode: tuple[DecodePlan, ...]  # one for each of `windows`; zeros for padding tokens are the decode kernel's work
    prefill: PrefillPlan | None  # None: no row is the prefill kernel's work, and it is not launched
    windows: tuple[int | None, ...]  # static
    tiles: GpuTiles  # static


jax.tree_util.register_dataclass(GpuPlan, data_fields=["decode", "prefill"], meta_fields=["windows", "tiles"])


def check_supported(geometry: AttentionGeometry) -> None:
    """NotImplementedError, with the reason, for geometries that these kernels cannot compute, or a CUDA that cannot."""
    _check_cuda(cuda_runtime_version())
    limits = {"head_dim": HEAD_DIMS, "dtype": DTYPES, "block_size": BLOCK_SIZES}
    for name, taken in limits.items():
        given = getattr(geometry, name)
        if given not in taken:
            raise NotImplementedError(f"mosaic_gpu takes a {name} of {', '.join(map(str, taken))}, got {given}")
    if geometry.group > MAX_GROUP:
        raise NotImplementedError(f"mosaic_gpu takes up to {MAX_GROUP} query heads a KV head, got {geometry.group}")
    check_prefill_supported(geometry)


def _check_cuda(version: int | None) -> None:
    if version is not None and version in _BROKEN_CUDA:
        raise NotImplementedError(
            f"mosaic_gpu does not run with CUDA {version // 1000}.{version % 1000 // 10}: ptxas miscompiles causal "
            "masks (12.8.0 to 12.9.0); install jaxserve[cuda13], or a CUDA before 12.8"
        )


def plan_shapes(
    *, geometry: AttentionGeometry, num_tokens: int, num_rows: int, blocks_per_seq: int, has_prefill: bool
) -> GpuPlan:
    """ShapeDtypeStructs of a bucket's plan."""
    prefill_plan = None
    if _is_mixed(num_tokens, has_prefill):
        prefill_plan = prefill_plan_shapes(geometry=geometry, num_tokens=num_tokens, num_rows=num_rows)
    sizes = _sizes(geometry, num_tokens, num_rows, blocks_per_seq, has_prefill)
    decode = decode_plan_shapes(geometry=geometry, sizes=sizes)
    tiles = GpuTiles.of(geometry)
    return GpuPlan(decode=decode, prefill=prefill_plan, windows=geometry.sliding_windows, tiles=tiles)


def build_plan(
    query_lens: np.ndarray,  # i32[batch rows], >= 1
    kv_lens: np.ndarray,  # i32[batch rows]
    block_tables: np.ndarray,
    *,
    geometry: AttentionGeometry,
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool,
    tiles: GpuTiles | None = None,  # by default GpuTiles.of(geometry)
) -> GpuPlan:
    """The plan of a batch as numpy arrays of the bucket's shapes; what the tables hold does not matter."""
    del block_tables
    query_lens, kv_lens = np.asarray(query_lens, np.int32), np.asarray(kv_lens, np.int32)
    rows, prefill_plan = None, None
    if _is_mixed(num_tokens, has_prefill):
        rows = np.flatnonzero(query_lens <= MAX_DECODE_TOKENS)
        starts = np.cumsum(query_lens, dtype=np.int32) - query_lens
        prefill_plan = build_prefill_plan(
            query_lens, kv_lens, starts, geometry=geometry, num_tokens=num_tokens, num_rows=num_rows
        )
    sizes = _sizes(geometry, num_tokens, num_rows, blocks_per_seq, has_prefill)
    decode = build_decode_plan(query_lens, kv_lens, geometry=geometry, sizes=sizes, num_tokens=num_tokens, rows=rows)
    tiles = tiles or GpuTiles.of(geometry)
    return GpuPlan(decode=decode, prefill=prefill_plan, windows=geometry.sliding_windows, tiles=tiles)


def _is_mixed(num_tokens: int, has_prefill: bool) -> bool:
    """Whether a bucket's steps launch the prefill kernel, be there rows for it or not.

    Small ones do not: a launch without work costs a decode step of 32 rows 3 to 4 us of 60 in each layer. A long row is
    then several tiles of the decode kernel, which each read its keys, mostly from the L2 cache, and split them among
    multiprocessors, most of which the few items of a prefill would leave idle.
    """
    return has_prefill and num_tokens > MAX_DECODE_BUCKET


def _sizes(
    geometry: AttentionGeometry, num_tokens: int, num_rows: int, blocks_per_seq: int, has_prefill: bool
) -> DecodeSizes:
    return decode_sizes(
        geometry=geometry,
        num_tokens=num_tokens,
        num_rows=num_rows,
        blocks_per_seq=blocks_per_seq,
        has_prefill=has_prefill,
    )


def paged_attention(
    q: jax.Array,  # [tokens, q_heads, head_dim]
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,  # f32[q_heads]
    interpret: Any = None,  # compat.gpu_interpret_params(): run on the CPU
) -> jax.Array:
    """Returns [tokens, q_heads, head_dim] in q's dtype; see `paged_attention.op`.

    ValueError if the batch was not planned for `sliding_window`.
    """
    plan: GpuPlan = metadata.plan
    if sliding_window not in plan.windows:
        raise ValueError(f"the batch was planned for sliding windows {plan.windows}, not for {sliding_window}")
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "soft_cap": soft_cap, "sinks": sinks}
    decode_plan = plan.decode[plan.windows.index(sliding_window)]
    out = paged_decode(
        q,
        k_pool,
        v_pool,
        metadata.block_tables,
        decode_plan,
        **options,
        tiles=plan.tiles.decode,
        interpret=interpret,
    )
    if plan.prefill is None:
        return out
    return prefill(
        q,
        k_pool,
        v_pool,
        out,
        metadata.block_tables,
        metadata.kv_lens,
        plan.prefill,
        **options,
        tiles=plan.tiles.prefill,
        interpret=interpret,
    )
