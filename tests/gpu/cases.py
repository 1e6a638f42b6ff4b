"""The batches that kernels must get right on the device: those of every op's `cases.py`, and what GPU kernels fear."""

from __future__ import annotations

from dataclasses import replace

from pallas_kernels.dispatch import Implementation
from pallas_kernels.kv_write.cases import CASES as WRITE_CASES
from pallas_kernels.kv_write.cases import Case as WriteCase
from pallas_kernels.paged_attention.cases import CASES, Case
from tests.gpu.sizes import Sizes

HEAD_DIMS = (64, 80, 96, 128, 256)
# Of `BATCHES`: what other devices do with shared blocks and with groups of rows, which is nothing special here, and
# what `SUPPORTED` and the cases below have too. Each case is a program to compile, and the whole check has minutes.
_SAME_AS_OTHERS = frozenset({
    "common_chunks", "common_chunks_bfloat16", "common_chunks_to_the_last_token", "common_chunks_and_prefill",
    "common_chunks_of_tails", "more_rows_than_a_group", "multi_head", "four_queries_a_head",
    "eight_queries_on_one_head", "bfloat16", "float16", "blocks_of_32", "blocks_of_256", "chunk_edges",
    "padding_rows_and_tokens", "prefill_from_nothing", "prefill_continues_a_chunk", "sinks", "soft_cap",
    "window_of_one",
})  # fmt: skip
_DECODES = ((0, 1), (63, 1), (64, 1), (300, 1))  # a token; a tile of keys; a tile and one; long enough to be split
_MIXED = ((0, 70), (37, 1), (100, 64), (0, 1), (200, 30), (255, 1), (5, 2))
_LLAMA = Case(name="", rows=(), q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16", num_tokens=176, num_rows=8)

# The simplest first: what fails here explains what fails below.
_FIRST = (
    replace(_LLAMA, name="one_tile_of_keys", rows=((63, 1),), block_size=64, num_tokens=8),
    replace(_LLAMA, name="a_tile_and_a_key", rows=((64, 1),), block_size=64, num_tokens=8),
    replace(_LLAMA, name="one_tile_of_queries", rows=((0, 128),), block_size=64, has_prefill=True),
    replace(_LLAMA, name="a_tail_of_queries", rows=((0, 129),), block_size=64, has_prefill=True),
)
_BY_HEAD_DIM = tuple(
    replace(_LLAMA, name=f"{name}_of_{head_dim}", rows=rows, head_dim=head_dim, has_prefill=has_prefill)
    for head_dim in HEAD_DIMS
    for name, rows, has_prefill in (("decodes", _DECODES, False), ("mixed", _MIXED, True))
)
_OTHERS = (
    replace(_LLAMA, name="verified_tokens", rows=((0, 5), (300, 16), (160, 1), (3, 2)), has_prefill=True),
    replace(
        _LLAMA, name="long_rows_in_a_small_step", rows=((300, 40), (7, 1), (0, 18)), num_tokens=64, has_prefill=True
    ),
    replace(_LLAMA, name="tiles_of_three_tokens", rows=((300, 2), (14, 1)), num_tokens=3, has_prefill=True),
    replace(
        _LLAMA, name="everything_at_once", rows=_MIXED, has_prefill=True, sliding_window=100, soft_cap=3.0, sinks=True
    ),
)


def attention_cases(sizes: Sizes) -> dict[str, Case]:
    """By name, in the order to run them; without those that GPU kernels refuse, where these are checked.

    GPU kernels take 16-bit types alone: float32 cases become bfloat16 ones.
    """
    cases = (*_FIRST, *_BY_HEAD_DIM)
    if sizes.all_cases:
        cases = (*cases, *_OTHERS, *(case for case in CASES if case.name not in _SAME_AS_OTHERS))
    if sizes.name == "toy":
        cases = (_FIRST[1], _BY_HEAD_DIM[0], CASES[2])
    taken = (case for case in cases if sizes.implementation not in case.refused_by)  # any other refusal is a failure
    return {case.name: _narrowed(case, sizes.implementation) for case in taken}


def write_cases(sizes: Sizes) -> dict[str, WriteCase]:
    """By name."""
    return {case.name: case for case in (WRITE_CASES if sizes.all_cases else WRITE_CASES[:4])}


def rotation_cases(sizes: Sizes) -> dict[str, WriteCase]:
    """Those of writes that are as narrow as the fused kernel takes them; the others go through XLA and kv_write."""
    narrow = {name: case for name, case in write_cases(sizes).items() if case.dtype != "float32"}
    wide = WriteCase(name="several_tiles", slots=tuple(range(95, 15, -2)), kv_heads=8, head_dim=128, dtype="bfloat16")
    return narrow | {wide.name: wide}


def _narrowed(case: Case, implementation: Implementation) -> Case:
    is_wide = implementation == "mosaic_gpu" and case.dtype == "float32"
    return replace(case, dtype="bfloat16") if is_wide else case
