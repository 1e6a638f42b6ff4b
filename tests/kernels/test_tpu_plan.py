"""The TPU plan: every token in one item, shapes from the bucket alone, tiles that fit, lanes that hold heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_tpu import build_plan, plan_shapes, pool_shape
from pallas_kernels.paged_attention.mosaic_tpu.layout import (
    HeadLayout,
    keys_to_lanes,
    queries_to_lanes,
    results_from_lanes,
)
from pallas_kernels.paged_attention.mosaic_tpu.tiles import heuristic_decode_tiles, heuristic_prefill_tiles

NUM_TOKENS, NUM_ROWS, BLOCKS_PER_SEQ = 512, 8, 40
GEOMETRY = AttentionGeometry(q_heads=9, kv_heads=3, head_dim=64, block_size=16, dtype="bfloat16")


def make_plan(rows, *, has_prefill=True, num_tokens=NUM_TOKENS):
    query_lens = np.asarray([new for _, new in rows], np.int32)
    kv_lens = np.asarray([computed + new for computed, new in rows], np.int32)
    return build_plan(
        query_lens,
        kv_lens,
        np.zeros((len(rows), BLOCKS_PER_SEQ), np.int32),
        geometry=GEOMETRY,
        num_tokens=num_tokens,
        num_rows=NUM_ROWS,
        blocks_per_seq=BLOCKS_PER_SEQ,
        has_prefill=has_prefill,
    )


def items(work):
    """(row, position) of each token of a work list, by token."""
    found = {}
    for row, token, position, length in zip(work.rows, work.tokens, work.positions, work.lens, strict=True):
        for index in range(length):
            assert token + index not in found, "a token is computed twice"
            found[int(token) + index] = (int(row), int(position) + index)
    return found


row = st.tuples(st.integers(0, 500), st.one_of(st.just(1), st.integers(1, 60)))


@settings(max_examples=60, deadline=None)
@given(st.lists(row, max_size=NUM_ROWS))
def test_every_token_is_in_one_item_at_its_position(rows):
    plan = make_plan(rows)
    expected = [(index, computed + new) for index, (computed, count) in enumerate(rows) for new in range(count)]
    assert items(plan.decodes) | items(plan.tiles) == dict(enumerate(expected))
    assert int(plan.decodes.num_items[0]) == sum(count == 1 for _, count in rows)
    assert max(plan.tiles.lens) <= heuristic_prefill_tiles(GEOMETRY).query_tile
    for work in (plan.decodes, plan.tiles):
        count = int(work.num_items[0])
        assert np.all(work.lens[:count] > 0)
        assert not work.lens[count:].any()


@pytest.mark.parametrize(
    "rows",
    [[], [(0, NUM_TOKENS)], [(5, 1)] * NUM_ROWS, [(0, 33)] * NUM_ROWS, [(0, 2)] * (NUM_ROWS - 1) + [(0, 498)]],
    ids=["empty", "one_row", "decodes", "just_over_a_tile", "many_partial_tiles"],
)
@pytest.mark.parametrize("has_prefill", [True, False])
def test_plans_have_the_shapes_of_their_bucket(rows, has_prefill):
    if not has_prefill and any(count > 1 for _, count in rows):
        rows = []
    plan = make_plan(rows, has_prefill=has_prefill)
    shapes = plan_shapes(
        geometry=GEOMETRY,
        num_tokens=NUM_TOKENS,
        num_rows=NUM_ROWS,
        blocks_per_seq=BLOCKS_PER_SEQ,
        has_prefill=has_prefill,
    )
    assert jax.tree.structure(plan) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(plan), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, np.int32)


def test_a_bucket_of_one_token_has_a_plan():
    plan = make_plan([(7, 1)], num_tokens=1)
    assert items(plan.decodes) == {0: (0, 7)}


@pytest.mark.parametrize("block_size", [16, 48, 80, 128, 256])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (8, 1, 128), (9, 3, 64), (32, 32, 80)])
def test_tiles_are_whole_blocks_and_whole_lanes_of_scores(q_heads, kv_heads, head_dim, block_size):
    geometry = AttentionGeometry(
        q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype="bfloat16"
    )
    for tiles in (heuristic_decode_tiles(geometry), heuristic_prefill_tiles(geometry)):
        assert tiles.kv_tile % block_size == 0
        assert tiles.kv_tile % tiles.kv_chunk == 0
        assert tiles.kv_chunk % 128 == 0
    query_tile = heuristic_prefill_tiles(geometry).query_tile
    assert query_tile & (query_tile - 1) == 0
    assert 16 <= query_tile <= 128


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 2, 128), (4, 2, 80), (2, 1, 256)])
def test_queries_meet_the_keys_of_their_own_head_alone(q_heads, kv_heads, head_dim):
    layout = HeadLayout(q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((5, q_heads, head_dim), np.float32)
    k = rng.standard_normal((5, kv_heads, head_dim), np.float32)
    lanes = pool_shape(1, 16, kv_heads, head_dim)[2]
    lane_q = np.asarray(queries_to_lanes(jnp.asarray(q), layout))
    units = np.asarray(keys_to_lanes(jnp.asarray(k), lanes)).reshape(5, layout.units, layout.unit_lanes)
    for unit in range(layout.units):
        for head in layout.q_heads_of(unit):
            expected = np.einsum("td,td->t", q[:, head], k[:, head * kv_heads // q_heads])
            np.testing.assert_allclose((lane_q[:, head] * units[:, unit]).sum(-1), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results_from_lanes(jnp.asarray(lane_q), layout), q)
