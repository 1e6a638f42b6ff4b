"""The plan of the GPU prefill kernel: every query token of a long row in one item, lengths fixed by the bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import (
    MAX_DECODE_TOKENS,
    MAX_FOLDED_HEADS,
    build_prefill_plan,
    folded_heads,
    prefill_plan_shapes,
    tokens_per_item,
)

ROWS = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 300)), min_size=0, max_size=12)


def plan_of(rows, group, *, spare_tokens=0, spare_rows=0):
    geometry = AttentionGeometry(q_heads=2 * group, kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
    query_lens = np.asarray([new for _, new in rows], np.int32)
    kv_lens = np.asarray([computed + new for computed, new in rows], np.int32)
    starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
    sizes = {"num_tokens": int(starts[-1]) + spare_tokens, "num_rows": len(rows) + spare_rows}
    plan = build_prefill_plan(query_lens, kv_lens, starts, geometry=geometry, **sizes)
    return plan, prefill_plan_shapes(geometry=geometry, **sizes), starts


@given(rows=ROWS, group=st.integers(1, 16), spare_tokens=st.integers(0, 40), spare_rows=st.integers(0, 3))
def test_each_token_of_a_long_row_is_in_exactly_one_item(rows, group, spare_tokens, spare_rows):
    plan, shapes, starts = plan_of(rows, group, spare_tokens=spare_tokens, spare_rows=spare_rows)
    seen = np.zeros(starts[-1] + spare_tokens, int)
    items = zip(plan.rows, plan.first_tokens, plan.num_tokens, plan.first_positions, plan.computed_lens, strict=True)
    for row, first, count, position, computed in items:
        if count == 0:
            continue
        before = max(computed - position, 0)
        seen[first + before : first + count] += 1
        assert 0 <= before < count <= tokens_per_item(group)
        assert first % 8 == 0
        assert starts[row] <= first + before
        assert first + count <= starts[row + 1]
        assert computed == rows[row][0]
        assert position == computed + first - starts[row]
    expected = [int(new > MAX_DECODE_TOKENS) for _, new in rows for _ in range(new)]
    np.testing.assert_array_equal(seen[: starts[-1]], expected)
    assert not seen[starts[-1] :].any()
    for leaf, shape in zip(vars_of(plan), vars_of(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def vars_of(plan):
    return [plan.rows, plan.first_tokens, plan.num_tokens, plan.first_positions, plan.computed_lens]


@given(rows=ROWS, group=st.integers(1, 16))
def test_items_come_longest_first_and_empty_ones_last(rows, group):
    plan, _, _ = plan_of(rows, group, spare_tokens=200, spare_rows=2)
    keys = plan.first_positions + plan.num_tokens
    assert np.all(keys[:-1] >= keys[1:])


@pytest.mark.parametrize("group", range(1, 17))
def test_folded_heads_divide_the_group_and_the_tile(group):
    heads = folded_heads(group)
    assert group % heads == 0
    assert 64 % heads == 0
    assert 1 <= heads <= MAX_FOLDED_HEADS


def test_the_longest_bucket_of_short_prefills_fits():
    plan, shapes, _ = plan_of([(0, MAX_DECODE_TOKENS + 1)] * 12, 8)
    assert np.count_nonzero(plan.num_tokens) == 24
    assert shapes.rows.shape == (12 * (17 + 7) // 16 + 12,)
