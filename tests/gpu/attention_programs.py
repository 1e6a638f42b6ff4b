"""The attention of the model under test: its sizes, and the batches that it is timed with."""

from __future__ import annotations

from pallas_kernels.paged_attention import AttentionGeometry
from pallas_kernels.paged_attention.runs import AttentionRun
from tests.gpu.sizes import Sizes

CHAINS_AT_ONCE = 8  # under way: the host takes long for a program of hundreds of arguments


def geometry_of(sizes: Sizes) -> AttentionGeometry:
    """Of the model that steps are timed with."""
    model = sizes.model
    return AttentionGeometry(
        q_heads=model["num_attention_heads"],
        kv_heads=model["num_key_value_heads"],
        head_dim=model["hidden_size"] // model["num_attention_heads"],
        block_size=sizes.block_size,
        dtype=sizes.dtype,
    )


def decode_run(sizes: Sizes, batch: int, *, has_prefill: bool) -> AttentionRun:
    """`batch` rows of one new token at the end of the context."""
    return AttentionRun(
        geometry=geometry_of(sizes),
        implementation=sizes.implementation,
        rows=batch,
        query_len=1,
        kv_len=sizes.context,
        has_prefill=has_prefill,
        cold_bytes=sizes.cold_bytes,
    )


def prefill_run(sizes: Sizes, prompt: int) -> AttentionRun:
    """Whole prompts of this length, as many as fill the step."""
    return AttentionRun(
        geometry=geometry_of(sizes),
        implementation=sizes.implementation,
        rows=sizes.prefill_tokens // prompt,
        query_len=prompt,
        kv_len=prompt,
        has_prefill=True,
        cold_bytes=sizes.cold_bytes,
    )
