"""What a step's batch looks like to paged attention: built once a step on the host with numpy, shared by all layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_attention.geometry import AttentionGeometry, padded
from pallas_kernels.paged_attention.implementations import implementation_of


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """A padded batch and one implementation's plan to compute it.

    Tokens of a row lie side by side, rows in order, padding tokens last. Shapes depend only on the token and row
    buckets, the widest block table, the geometry, and whether rows of several tokens may come.
    """

    query_starts: jax.Array  # i32[rows + 1], first token of each row; the last entry and padding rows: num tokens
    kv_lens: jax.Array  # i32[rows], tokens of the sequence after this step, 0 for padding rows
    block_tables: jax.Array  # i32[rows, blocks_per_seq], 0 past a sequence's end; None until `with_tables`
    plan: Any  # a pytree of i32 arrays: the implementation's own work list
    implementation: Implementation  # static: who made the plan, and computes it
    geometry: AttentionGeometry  # static: what it was planned for
    num_tokens: int  # static: of the bucket

    def with_tables(self, block_tables: jax.Array | np.ndarray) -> "AttentionMetadata":
        """The same with block tables, i32[rows, blocks_per_seq]."""
        return dataclasses.replace(self, block_tables=block_tables)


jax.tree_util.register_dataclass(
    AttentionMetadata,
    data_fields=["query_starts", "kv_lens", "block_tables", "plan"],
    meta_fields=["implementation", "geometry", "num_tokens"],
)


def metadata_shapes(
    *,
    geometry: AttentionGeometry,
    implementation: Implementation = "xla",
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool = True,
) -> AttentionMetadata:
    """The ShapeDtypeStructs of a bucket's metadata, for compiling ahead of time.

    With `has_prefill` a step may mix rows of one token and of many. Without it every row has one token, and the step
    compiles without the part that computes the others.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "query_starts": (num_rows + 1,),
        "kv_lens": (num_rows,),
        "block_tables": (num_rows, blocks_per_seq),
    }
    plan = implementation_of(implementation).plan_shapes(
        geometry=geometry,
        num_tokens=num_tokens,
        num_rows=num_rows,
        blocks_per_seq=blocks_per_seq,
        has_prefill=has_prefill,
    )
    # jax types its fields as arrays; here the leaves are their shapes.
    leaves: dict[str, Any] = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    return AttentionMetadata(
        **leaves, plan=plan, implementation=implementation, geometry=geometry, num_tokens=num_tokens
    )


def build_metadata(
    query_lens: Sequence[int] | np.ndarray,  # [batch rows], new tokens of each row, >= 1
    kv_lens: Sequence[int] | np.ndarray,  # [batch rows], computed tokens + new tokens
    block_tables: np.ndarray,  # i32[batch rows, blocks_per_seq]; the width is part of the compiled shape
    *,
    geometry: AttentionGeometry,
    implementation: Implementation = "xla",
    num_tokens: int,
    num_rows: int,
    has_prefill: bool = True,
) -> AttentionMetadata:
    """Builds a step's metadata as numpy arrays of the shapes that `metadata_shapes` gives for the bucket.

    The bucket is (num_tokens, num_rows); ValueError if the batch does not fit it.
    """
    metadata = build_without_tables(
        query_lens,
        kv_lens,
        block_tables,
        geometry=geometry,
        implementation=implementation,
        num_tokens=num_tokens,
        num_rows=num_rows,
        blocks_per_seq=block_tables.shape[1],
        has_prefill=has_prefill,
    )
    tables = np.zeros((num_rows, block_tables.shape[1]), np.int32)
    tables[: len(block_tables)] = block_tables
    return metadata.with_tables(tables)


def build_without_tables(
    query_lens: Sequence[int] | np.ndarray,  # [batch rows], new tokens of each row, >= 1
    kv_lens: Sequence[int] | np.ndarray,  # [batch rows], computed tokens + new tokens
    block_tables: np.ndarray,  # i32[batch rows, as many columns as the longest row fills, or more]
    *,
    geometry: AttentionGeometry,
    implementation: Implementation,
    num_tokens: int,
    num_rows: int,
    blocks_per_seq: int,
    has_prefill: bool = True,
) -> AttentionMetadata:
    """`build_metadata` for whoever keeps block tables on the device: what is compiled takes them by `with_tables`."""
    query_lens, kv_lens = np.asarray(query_lens, np.int32), np.asarray(kv_lens, np.int32)
    _check_batch(query_lens, kv_lens, block_tables, geometry.block_size)
    _check_fits(query_lens, num_tokens, num_rows, has_prefill)
    starts = np.full(num_rows + 1, query_lens.sum(), np.int32)
    starts[0] = 0
    np.cumsum(query_lens, out=starts[1 : len(query_lens) + 1])
    plan = implementation_of(implementation).build_plan(
        query_lens,
        kv_lens,
        block_tables,
        geometry=geometry,
        num_tokens=num_tokens,
        num_rows=num_rows,
        blocks_per_seq=blocks_per_seq,
        has_prefill=has_prefill,
    )
    leaves: dict[str, Any] = {"query_starts": starts, "kv_lens": padded(kv_lens, num_rows), "block_tables": None}
    return AttentionMetadata(
        **leaves, plan=plan, implementation=implementation, geometry=geometry, num_tokens=num_tokens
    )


def _check_batch(query_lens: np.ndarray, kv_lens: np.ndarray, block_tables: np.ndarray, block_size: int) -> None:
    if kv_lens.shape != query_lens.shape or block_tables.ndim != 2 or len(block_tables) != len(query_lens):
        raise ValueError(
            f"query_lens, kv_lens and block_tables must agree on the rows, got {query_lens.shape}, {kv_lens.shape} "
            f"and {block_tables.shape}"
        )
    if len(query_lens) == 0:
        return
    if query_lens.min() < 1 or (kv_lens < query_lens).any():
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
    if not has_prefill and (query_lens > 1).any():
        raise ValueError("a row of several tokens needs metadata with has_prefill=True")
