"""Batches that every implementation of paged attention must get right, their seeded inputs, and what is right."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation
from pallas_kernels.numerics import logical_dtype, pool_dtype, pool_shape
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.metadata import AttentionMetadata, build_metadata
from pallas_kernels.paged_attention.reference import paged_attention_reference


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One batch. Rows are (computed tokens, new tokens)."""

    name: str
    rows: tuple[tuple[int, int], ...]
    q_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: str = "float32"
    num_tokens: int = 8  # bucket
    num_rows: int = 4  # bucket
    has_prefill: bool = False
    scale: float | None = None  # None: head_dim**-0.5
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    shared_blocks: int = 0  # leading blocks that all rows share, as far as they have them
    refused_by: tuple[str, ...] = ()  # implementations whose check_supported refuses the geometry

    @property
    def geometry(self) -> AttentionGeometry:
        """Of a model all of whose layers look like the case."""
        return AttentionGeometry(
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            dtype=self.dtype,
            sliding_windows=(self.sliding_window,),
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the op, its implementations and its reference are asked for by keyword, beside sinks."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return {"scale": scale, "sliding_window": self.sliding_window, "soft_cap": self.soft_cap}

    @property
    def query_lens(self) -> list[int]:
        """New tokens of each row."""
        return [new for _, new in self.rows]

    @property
    def kv_lens(self) -> list[int]:
        """Tokens of each row after the step."""
        return [computed + new for computed, new in self.rows]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Inputs of a case; `k_values` and `v_values` are what the pools hold, as float64."""

    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    k_values: np.ndarray
    v_values: np.ndarray
    sinks: jax.Array | None  # f32[q_heads]
    block_tables: np.ndarray  # i32[batch rows, blocks_per_seq]
    metadata: AttentionMetadata


BLOCKS_PER_SEQ = 384 // 16
_DECODES = ((0, 1), (14, 1), (15, 1), (16, 1))  # one token; one short of a block, a full block, a block and one
_MIXED = ((0, 70), (37, 1), (100, 64), (0, 1), (200, 30), (255, 1), (5, 2))
_SHARERS = tuple((272 + 5 * i, 1) for i in range(20))

# What a batch may look like.
BATCHES: tuple[Case, ...] = (
    Case(name="no_rows", rows=()),
    Case(name="one_row_of_one_token", rows=((0, 1),), num_tokens=1, num_rows=1),
    Case(name="block_edges", rows=_DECODES),
    Case(name="padding_rows_and_tokens", rows=((130, 1), (3, 1)), has_prefill=True),
    Case(name="chunk_edges", rows=((126, 1), (127, 1), (128, 1), (256, 1))),
    Case(name="more_rows_than_a_group", rows=tuple((17 * i, 1) for i in range(20)), num_tokens=20, num_rows=20),
    Case(name="multi_head", rows=_DECODES, q_heads=4, kv_heads=4),
    Case(name="four_queries_a_head", rows=_DECODES, q_heads=8, kv_heads=2, head_dim=128),
    Case(name="eight_queries_on_one_head", rows=_DECODES, q_heads=8, kv_heads=1),
    Case(name="prefill_in_a_small_bucket", rows=((0, 5), (150, 3), (7, 1)), num_tokens=16, has_prefill=True),
    Case(
        name="window_in_a_small_bucket",
        rows=((0, 5), (150, 9)),
        num_tokens=16,
        has_prefill=True,
        sliding_window=4,
        dtype="bfloat16",
    ),
    Case(name="prefill_from_nothing", rows=((0, 130),), num_tokens=136, num_rows=4, has_prefill=True),
    Case(name="prefill_continues_a_chunk", rows=((150, 100),), num_tokens=136, num_rows=4, has_prefill=True),
    Case(name="decodes_and_prefills", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True),
    Case(name="shared_prefix", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, shared_blocks=2),
    Case(name="common_chunks", rows=_SHARERS, num_tokens=20, num_rows=20, shared_blocks=17),
    Case(name="common_chunks_bfloat16", rows=_SHARERS, num_tokens=20, num_rows=20, shared_blocks=9, dtype="bfloat16"),
    Case(name="common_chunks_to_the_last_token", rows=((256, 1),) * 8, num_tokens=8, num_rows=8, shared_blocks=16),
    Case(
        name="common_chunks_and_prefill",
        rows=(*_SHARERS, (280, 70)),
        num_tokens=96,
        num_rows=24,
        has_prefill=True,
        shared_blocks=16,
    ),
    Case(
        name="common_chunks_of_tails",
        rows=((272, 34), (280, 65), (275, 3)),
        num_tokens=136,
        has_prefill=True,
        shared_blocks=17,
        soft_cap=3.0,
        sinks=True,
    ),
    Case(name="sliding_window", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, sliding_window=40),
    Case(name="window_of_one", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, sliding_window=1),
    Case(name="sinks", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, sinks=True),
    Case(name="sinks_and_window", rows=_DECODES, sliding_window=3, soft_cap=2.0, sinks=True),
    Case(name="soft_cap", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, soft_cap=2.0),
    Case(name="bfloat16", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, dtype="bfloat16"),
    Case(
        name="float16",
        rows=_MIXED,
        num_tokens=176,
        num_rows=8,
        has_prefill=True,
        dtype="float16",
        refused_by=("native_cpu", "mosaic_tpu"),
    ),
    Case(
        name="blocks_of_32", rows=_MIXED, num_tokens=176, num_rows=8, has_prefill=True, dtype="bfloat16", block_size=32
    ),
    Case(
        name="blocks_of_48",
        rows=_MIXED,
        num_tokens=176,
        num_rows=8,
        has_prefill=True,
        block_size=48,
        refused_by=("mosaic_gpu",),
    ),
    Case(
        name="blocks_of_256",
        rows=_MIXED,
        num_tokens=176,
        num_rows=8,
        has_prefill=True,
        dtype="bfloat16",
        block_size=256,
    ),
)


# What a model may ask for, in batches so small that interpreters run them too: every number of query heads on a KV head
# up to 16, and with these pairwise head dimensions, block sizes, options and three kinds of steps.
_decodes = partial(Case, rows=((0, 1), (15, 1), (16, 1), (75, 1)), dtype="bfloat16", kv_heads=1)
# A token, 16 of a row with its drafts, and a longer row: the decode kernel's on a GPU, in a step as small as this ...
_small = partial(Case, rows=((9, 1), (50, 16), (30, 20)), dtype="bfloat16", kv_heads=1, num_tokens=40, has_prefill=True)
_mixed = partial(_small, num_tokens=72)  # ... and in this one the prefill kernel's
_EVERYTHING = {"sliding_window": 30, "soft_cap": 3.0, "sinks": True}
_HALF = {"dtype": "float16", "refused_by": ("native_cpu", "mosaic_tpu")}

SUPPORTED: tuple[Case, ...] = (
    # Each head dimension, block size and tile of folded heads in both kernels of GPUs, with all options at once.
    _mixed(name="group_1_of_80", q_heads=2, kv_heads=2, head_dim=80, **_EVERYTHING),
    _mixed(name="group_2_of_256", q_heads=2, head_dim=256, block_size=64, **_EVERYTHING),
    _mixed(name="group_4_of_128", q_heads=4, head_dim=128, block_size=256, **_EVERYTHING),
    _mixed(name="group_8_of_64", q_heads=8, block_size=32, scale=0.2, **_EVERYTHING),
    _mixed(name="group_16_of_96", q_heads=16, head_dim=96, block_size=128, **_EVERYTHING),
    # Groups that fill no tile, with one option or none, in steps of decodes ...
    _decodes(name="group_3_of_64", q_heads=3, block_size=128, scale=0.37),
    _decodes(name="group_11_of_96", q_heads=11, head_dim=96, block_size=256, soft_cap=3.0),
    _decodes(name="group_15_of_128", q_heads=15, head_dim=128, block_size=64, sinks=True),
    # ... and in steps whose tiles of queries have several tokens.
    _small(name="group_5_of_96", q_heads=5, head_dim=96, block_size=32),
    _small(name="group_6_of_80", q_heads=6, head_dim=80, block_size=128, sliding_window=30),
    _small(name="group_7_of_128", q_heads=7, head_dim=128, block_size=32, scale=0.2),
    _small(name="group_9_of_256", q_heads=9, head_dim=256, sinks=True),
    _small(name="group_10_of_80", q_heads=10, head_dim=80, block_size=64, soft_cap=3.0),
    _small(name="group_12_of_128", q_heads=12, head_dim=128, sliding_window=1),
    _small(name="group_13_of_256", q_heads=13, head_dim=256, block_size=128),
    _small(name="group_14_of_64", q_heads=14, block_size=256, sliding_window=30, sinks=True),
    # The other type of 16 bits, for each head dimension.
    _small(name="float16_of_64", q_heads=3, block_size=64, **_EVERYTHING, **_HALF),
    _decodes(name="float16_of_80", q_heads=5, head_dim=80, block_size=32, sliding_window=30, **_HALF),
    _small(name="float16_of_96", q_heads=2, head_dim=96, **_HALF),
    _mixed(name="float16_of_128", q_heads=2, head_dim=128, block_size=128, scale=0.2, **_HALF),
    _decodes(name="float16_of_256", q_heads=4, head_dim=256, soft_cap=3.0, **_HALF),
)
CASES = (*BATCHES, *SUPPORTED)


def make_inputs(case: Case, *, implementation: Implementation = "xla", unread: float = 0.0, seed: int = 0) -> Inputs:
    """Seeded inputs with permuted blocks, and the plan. Slots that no row may read hold `unread`."""
    rng = np.random.default_rng(seed)
    blocks_per_seq = -(-BLOCKS_PER_SEQ * 16 // case.block_size)
    used = [-(-kv_len // case.block_size) for kv_len in case.kv_lens]
    num_blocks = 1 + sum(used) + 3
    ids = 1 + rng.permutation(num_blocks - 1).astype(np.int32)
    tables = np.zeros((len(used), blocks_per_seq), np.int32)
    for row, count in enumerate(used):
        tables[row, :count], ids = ids[:count], ids[count:]
        if row:
            shared = min(count, used[0], case.shared_blocks)
            tables[row, :shared] = tables[0, :shared]

    stored = pool_dtype(case.dtype, jax.default_backend())
    shape = pool_shape(num_blocks, case.block_size, case.kv_heads, case.head_dim)
    values = rng.standard_normal((2, *shape)).astype(logical_dtype(stored))
    values[:, ~_readable(case, tables, shape[:2])] = unread
    q = rng.standard_normal((case.num_tokens, case.q_heads, case.head_dim)).astype(values.dtype)
    k_pool, v_pool = jnp.asarray(values.view(stored))
    metadata = build_metadata(
        case.query_lens,
        case.kv_lens,
        tables,
        geometry=case.geometry,
        implementation=implementation,
        num_tokens=case.num_tokens,
        num_rows=case.num_rows,
        has_prefill=case.has_prefill,
    )
    k_values, v_values = values.astype(np.float64)
    return Inputs(
        q=jnp.asarray(q),
        k_pool=k_pool,
        v_pool=v_pool,
        k_values=k_values,
        v_values=v_values,
        sinks=jnp.asarray(rng.standard_normal(case.q_heads), jnp.float32) if case.sinks else None,
        block_tables=tables,
        metadata=metadata,
    )


def expected(case: Case, inputs: Inputs) -> np.ndarray:
    """The reference's float64 [tokens, q_heads, head_dim]."""
    return paged_attention_reference(
        np.asarray(inputs.q.astype(jnp.float32)),
        inputs.k_values,
        inputs.v_values,
        case.query_lens,
        case.kv_lens,
        inputs.block_tables,
        **case.options,
        sinks=None if inputs.sinks is None else np.asarray(inputs.sinks),
    )


def _readable(case: Case, tables: np.ndarray, pool_slots: tuple[int, ...]) -> np.ndarray:
    """bool[num_blocks, block_size]: slots that some row may read."""
    readable = np.zeros(pool_slots, bool)
    for table, (computed, new) in zip(tables, case.rows, strict=True):
        first = 0 if case.sliding_window is None else max(0, computed - case.sliding_window + 1)
        positions = np.arange(first, computed + new)
        readable[table[positions // case.block_size], positions % case.block_size] = True
    return readable
