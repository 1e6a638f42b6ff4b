"""The work list of the GPU decode kernel: every query meets every key that it sees once, within the bucket's sizes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import mosaic_gpu
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import (
    MIN_CHUNK,
    DecodePlan,
    Item,
    Merge,
    build_decode_plan,
    decode_plan_shapes,
    decode_sizes,
)
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import MAX_DECODE_BUCKET
from tests.kernels.line_count import lines_run


def geometry_of(*, group=4, kv_heads=8, windows: tuple[int | None, ...] = (None,)):
    return AttentionGeometry(
        q_heads=group * kv_heads,
        kv_heads=kv_heads,
        head_dim=128,
        block_size=16,
        dtype="bfloat16",
        sliding_windows=windows,
    )


def build(query_lens, kv_lens, *, geometry, num_tokens, num_rows, blocks_per_seq=512, num_sms=132):
    has_prefill = max(query_lens, default=1) > 1
    sizes = decode_sizes(
        geometry=geometry,
        num_tokens=num_tokens,
        num_rows=num_rows,
        blocks_per_seq=blocks_per_seq,
        has_prefill=has_prefill,
        num_sms=num_sms,
    )
    return sizes, build_decode_plan(query_lens, kv_lens, geometry=geometry, sizes=sizes, num_tokens=num_tokens)


def items_of(plan: DecodePlan) -> np.ndarray:
    return np.asarray(plan.items)[: int(plan.items[0, Item.NUM_ITEMS])]


def visible(query_lens, kv_lens, window, num_tokens) -> np.ndarray:
    """int[tokens, positions]: 1 where the token sees the position of its own sequence."""
    seen = np.zeros((num_tokens, max(kv_lens, default=0) + 1), int)
    token = 0
    for query_len, kv_len in zip(query_lens, kv_lens, strict=True):
        for position in range(kv_len - query_len, kv_len):
            seen[token, 0 if window is None else max(0, position - window + 1) : position + 1] = 1
            token += 1
    return seen


def met(items: np.ndarray, window, shape) -> np.ndarray:
    """How often the kernel lets each token meet each position, from what it reads of an item."""
    counts = np.zeros(shape, int)
    for item in items:
        for index in range(item[Item.NUM_TOKENS]):
            position = item[Item.POSITION] + index
            first = 0 if window is None else max(0, position - window + 1)
            first, end = max(first, item[Item.KV_LO]), min(position + 1, item[Item.KV_HI])
            counts[item[Item.TOKEN] + index, first : max(first, end)] += 1
    return counts


@st.composite
def batches(draw):
    max_query = draw(st.sampled_from([1, 16, MAX_DECODE_BUCKET]))
    rows = draw(st.lists(st.tuples(st.integers(1, max_query), st.integers(0, 1500)), max_size=12))
    query_lens = [new for new, _ in rows]
    return {
        "query_lens": query_lens,
        "kv_lens": [new + computed for new, computed in rows],
        "num_tokens": sum(query_lens) + draw(st.integers(0, 9)) or 1,
        "num_rows": len(rows) + draw(st.integers(0, 3)) or 1,
        "num_sms": draw(st.sampled_from([1, 8, 132])),
        "group": draw(st.integers(1, 16)),
        "kv_heads": draw(st.sampled_from([1, 2, 8, 40])),
        "window": draw(st.sampled_from([None, 1, 64, 200, 5000])),
    }


@settings(max_examples=80, deadline=None)
@given(batch=batches())
def test_each_query_meets_each_key_that_it_sees_once(batch):
    window = batch["window"]
    geometry = geometry_of(group=batch["group"], kv_heads=batch["kv_heads"], windows=(window,))
    query_lens, kv_lens, num_tokens = batch["query_lens"], batch["kv_lens"], batch["num_tokens"]
    bucket = {"num_tokens": num_tokens, "num_rows": batch["num_rows"], "num_sms": batch["num_sms"]}
    sizes, (plan,) = build(query_lens, kv_lens, geometry=geometry, **bucket)
    items = items_of(plan)

    expected = visible(query_lens, kv_lens, window, num_tokens)
    np.testing.assert_array_equal(met(items, window, expected.shape), expected)
    assert not (items[:, Item.KV_LO] % MIN_CHUNK).any()
    assert (items[:, Item.NUM_TOKENS] <= sizes.tokens_per_tile).all()
    padding = items[items[:, Item.KV_LO] == items[:, Item.KV_HI]]
    covered = [token for item in padding for token in range(item[Item.TOKEN], item[Item.TOKEN] + item[Item.NUM_TOKENS])]
    assert covered == list(range(sum(query_lens), num_tokens))
    assert (padding[:, Item.PARTIAL] == plan.num_partials).all()


@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_a_merge_has_all_partials_of_its_tile_and_no_others(batch):
    geometry = geometry_of(group=batch["group"], kv_heads=batch["kv_heads"], windows=(batch["window"],))
    bucket = {"num_tokens": batch["num_tokens"], "num_rows": batch["num_rows"], "num_sms": batch["num_sms"]}
    _, (plan,) = build(batch["query_lens"], batch["kv_lens"], geometry=geometry, **bucket)
    items, merges = items_of(plan), np.asarray(plan.merges)
    split = items[items[:, Item.PARTIAL] < plan.num_partials]
    assert sorted(split[:, Item.PARTIAL]) == list(range(len(split)))
    by_partial = split[np.argsort(split[:, Item.PARTIAL])]
    used = merges[merges[:, Merge.NUM_TOKENS] > 0]
    for token, num_tokens, first, count in used:
        parts = by_partial[first : first + count]
        assert count >= 2
        assert (parts[:, Item.TOKEN] == token).all()
        assert (parts[:, Item.NUM_TOKENS] == num_tokens).all()
    assert used[:, Merge.COUNT].sum() == len(split)
    whole = items[items[:, Item.PARTIAL] == plan.num_partials]
    assert not set(whole[:, Item.TOKEN]) & set(split[:, Item.TOKEN])


def test_shapes_are_those_that_were_announced_for_each_window():
    geometry = geometry_of(windows=(None, 512))
    sizes, plans = build([1] * 5, [3000] * 5, geometry=geometry, num_tokens=8, num_rows=8)
    announced = decode_plan_shapes(geometry=geometry, sizes=sizes)
    assert len(plans) == 2
    for leaf, shape in zip(jax.tree.leaves(plans), jax.tree.leaves(announced), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert jax.tree.structure(plans) == jax.tree.structure(announced)


def test_a_long_row_alone_fills_the_device_and_a_full_batch_is_not_split():
    geometry = geometry_of()
    _, (alone,) = build([1], [8192], geometry=geometry, num_tokens=1, num_rows=1)
    assert 2 * 132 - 16 <= len(items_of(alone)) * geometry.kv_heads <= 2 * 132
    _, (full,) = build([1] * 256, [1024] * 256, geometry=geometry, num_tokens=256, num_rows=256)
    assert len(items_of(full)) == 256


def test_one_long_row_among_short_ones_is_split_and_comes_first():
    kv_lens = [1000] * 63 + [8000]
    _, (plan,) = build([1] * 64, kv_lens, geometry=geometry_of(), num_tokens=64, num_rows=64)
    items = items_of(plan)
    lengths = items[:, Item.KV_HI] - items[:, Item.KV_LO]
    assert (items[:, Item.ROW] == 63).sum() >= 4
    assert lengths.max() <= 2048
    assert (np.diff(lengths) <= 0).all()


def test_a_window_skips_the_keys_before_it():
    _, (plan,) = build([1], [5000], geometry=geometry_of(windows=(300,)), num_tokens=1, num_rows=1)
    items = items_of(plan)
    assert items[:, Item.KV_LO].min() == (4999 - 299) // MIN_CHUNK * MIN_CHUNK


def test_rows_left_to_another_kernel_are_not_planned():
    geometry = geometry_of()
    sizes = decode_sizes(geometry=geometry, num_tokens=64, num_rows=4, blocks_per_seq=16, has_prefill=True)
    (plan,) = build_decode_plan(
        [1, 40, 2], [9, 40, 8], geometry=geometry, sizes=sizes, num_tokens=64, rows=np.array([0, 2])
    )
    tokens = {(item[Item.TOKEN], item[Item.NUM_TOKENS]) for item in items_of(plan) if item[Item.KV_HI]}
    assert tokens == {(0, 1), (41, 2)}


def test_a_tile_has_no_more_tokens_than_the_step():
    sizes = {
        num_tokens: decode_sizes(
            geometry=geometry_of(), num_tokens=num_tokens, num_rows=num_tokens, blocks_per_seq=16, has_prefill=True
        ).tokens_per_tile
        for num_tokens in (1, 3, 8, 64)
    }
    assert sizes == {1: 1, 3: 3, 8: 8, 64: 8}


@pytest.mark.parametrize(("platform", "num_sms"), [("gpu", 114), ("cpu", 132)])
def test_work_is_split_among_the_multiprocessors_of_the_gpu_at_hand(monkeypatch, platform, num_sms):
    pcie_card = SimpleNamespace(platform=platform, core_count=114, device_kind="NVIDIA H100 PCIe")
    monkeypatch.setattr(jax, "devices", lambda: [pcie_card])
    bucket = {"geometry": geometry_of(), "num_tokens": 8, "num_rows": 8, "blocks_per_seq": 512, "has_prefill": False}
    shapes = mosaic_gpu.plan_shapes(**bucket)
    plan = mosaic_gpu.build_plan(np.ones(1, np.int32), np.full(1, 8192), np.zeros((1, 512)), **bucket)
    assert {part.decode[0].num_sms for part in (shapes, plan)} == {num_sms}
    assert plan.decode[0].items.shape == shapes.decode[0].items.shape == (8 + 2 * num_sms // 8, 8)


@pytest.mark.parametrize("windows", [(None,), (None, 4096)])
def test_256_rows_take_no_more_python_than_16(windows):
    geometry = geometry_of(windows=windows)

    def count(num_rows: int) -> int:
        kv_lens = np.random.default_rng(0).integers(1, 8192, num_rows)
        ones = np.ones(num_rows, np.int32)
        return lines_run(lambda: build(ones, kv_lens, geometry=geometry, num_tokens=256, num_rows=256))

    assert count(256) == count(16)
