"""Paged attention for TPUs against the float64 reference, in Pallas' interpreters; and what may not change a result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import tolerance
from pallas_kernels.paged_attention import AttentionGeometry
from pallas_kernels.paged_attention.cases import Case, expected, make_inputs
from pallas_kernels.paged_attention.mosaic_tpu import check_supported, paged_attention, settings, tiles
from tests.kernels import interpreted
from tests.kernels.left_out import not_missed

# One token; one short of a block, a full block, one more; a full chunk of keys and one more; several tiles of keys.
DECODES = ((0, 1), (14, 1), (15, 1), (16, 1), (127, 1), (128, 1), (300, 1))
# The same beside query tiles: from nothing, continued, of two tokens, over several tiles of queries and of keys.
MIXED = ((37, 1), (255, 1), (0, 70), (100, 2), (300, 60))
TINY = ((20, 1), (140, 1), (118, 18))

BREADTH = (
    Case(name="smollm2", rows=DECODES, q_heads=9, kv_heads=3, num_tokens=16, num_rows=8),
    Case(name="no_rows", rows=(), num_tokens=16, num_rows=8, q_heads=9, kv_heads=3),
    Case(name="mixed", rows=MIXED, num_tokens=176, num_rows=8, has_prefill=True, shared_blocks=2),
    Case(
        name="window_soft_cap_and_sinks",
        rows=MIXED,
        q_heads=9,
        kv_heads=3,
        dtype="bfloat16",
        num_tokens=144,
        num_rows=8,
        has_prefill=True,
        sliding_window=40,
        soft_cap=2.0,
        sinks=True,
    ),
)

SIMULATED = (
    Case(name="decodes", rows=DECODES[:4], q_heads=6, kv_heads=2, sinks=True),
    Case(name="mixed", rows=TINY, q_heads=4, kv_heads=1, head_dim=128, num_tokens=24, has_prefill=True),
    Case(
        name="window",
        rows=TINY,
        q_heads=3,
        kv_heads=3,
        dtype="bfloat16",
        num_tokens=24,
        has_prefill=True,
        sliding_window=20,
    ),
    Case(name="several_tiles_of_keys", rows=((300, 1), (20, 1), (270, 1)), q_heads=2, kv_heads=1),
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    interpreted.small_tiles_of_tpu(monkeypatch)


def attend(case, inputs, interpret):
    out = interpreted.on_tpu(case, inputs, interpret)
    assert out.dtype == inputs.q.dtype
    return np.asarray(out.astype(jnp.float32))


@pytest.mark.parametrize("case", BREADTH, ids=lambda case: case.name)
def test_agrees_with_the_reference_and_never_sees_nan_in_unread_slots(case):
    inputs = make_inputs(case, implementation="mosaic_tpu", unread=np.nan)
    np.testing.assert_allclose(attend(case, inputs, True), expected(case, inputs), **tolerance(case.dtype))


@pytest.mark.parametrize("case", SIMULATED, ids=lambda case: case.name)
def test_copies_arrive_before_they_are_used_and_do_not_race(case, capfd):
    inputs = make_inputs(case, implementation="mosaic_tpu", unread=np.nan)
    out = attend(case, inputs, pltpu.InterpretParams(detect_races=True))
    np.testing.assert_allclose(out, expected(case, inputs), **tolerance(case.dtype))
    assert "RACE" not in capfd.readouterr().out


def test_each_wait_is_missed_when_it_is_left_out(capfd):
    rows = ((20, 1), (140, 1), (9, 1), (300, 18), (30, 20))  # of tiles of 1 token, and of 16, 2, 16 and 4
    case = Case(
        name="waits", rows=rows, q_heads=4, kv_heads=1, head_dim=128, num_tokens=48, num_rows=8, has_prefill=True
    )
    inputs = make_inputs(case, implementation="mosaic_tpu", unread=np.nan)
    right = expected(case, inputs)

    def fails():
        try:
            out = attend(case, inputs, pltpu.InterpretParams(detect_races=True))
        except jax.errors.JaxRuntimeError:
            out = np.nan
        return "RACE" in capfd.readouterr().out or not np.allclose(out, right, **tolerance(case.dtype))

    assert not not_missed(fails, interpreted.watch_tpu_copies)


def geometry(**changes):
    sizes = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 128, "dtype": "bfloat16"}
    return AttentionGeometry(**sizes | changes)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8])
def test_takes_the_head_counts_and_blocks_that_models_have(kv_heads, head_dim, block_size):
    for group in (1, 3, 4, 8):
        check_supported(geometry(q_heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float16"}, "bfloat16"),
        ({"block_size": 24}, "multiples of 16"),
        ({"block_size": 512}, "up to 256"),
        ({"head_dim": 512}, "up to 256"),
        ({"q_heads": 512, "kv_heads": 512}, "VMEM"),
    ],
)
def test_says_what_it_cannot_do(changes, reason):
    with pytest.raises(NotImplementedError, match=reason):
        check_supported(geometry(**changes))


@pytest.mark.parametrize("blocks_per_seq", [1024, 1031])
def test_block_tables_larger_than_the_scalar_memory_are_read_where_they_lie(blocks_per_seq):
    """Rows of one block and of two tiles of keys; of 1031 blocks each row begins elsewhere in a copied part."""
    rows = (((5, 1),) * 9 + ((300, 1),)) * 25 + ((380, 1),)
    case = Case(name="tables", rows=rows, q_heads=2, kv_heads=1, num_tokens=256, num_rows=256)
    inputs = make_inputs(case, implementation="mosaic_tpu", unread=np.nan)
    tables = np.zeros((256, blocks_per_seq), np.int32)
    tables[: len(rows), : inputs.block_tables.shape[1]] = inputs.block_tables
    assert tables.nbytes >= 1 << 20
    wide = dataclasses.replace(inputs, metadata=inputs.metadata.with_tables(tables))
    np.testing.assert_allclose(attend(case, wide, True), expected(case, inputs), **tolerance(case.dtype))


@pytest.mark.parametrize(("kv_tile", "parts"), [(16, 1), (32, 2), (2064, 2), (2080, 3)])
def test_a_tile_s_blocks_lie_in_so_many_parts_of_the_tables(kv_tile, parts):
    sizes = tiles.Tiles(query_tile=1, kv_tile=kv_tile, kv_chunk=128)
    layout = tiles.layout_of(geometry())
    assert settings.Settings(layout=layout, tiles=sizes, block_size=16, dtype="bfloat16").table_parts == parts
    ends = [first % 128 + kv_tile // 16 for first in range(128)]
    assert max(ends) <= 128 * parts and max(ends) > 128 * (parts - 1)


def test_refuses_pools_of_another_layout():
    case = Case(name="layout", rows=())
    inputs = make_inputs(case, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="pool_shape"):
        paged_attention(inputs.q, inputs.k_pool, inputs.v_pool, inputs.metadata, scale=1.0, interpret=True)
