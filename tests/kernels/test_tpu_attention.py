"""Paged attention for TPUs against the float64 reference, in Pallas' interpreters; and what may not change a result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.numerics import tolerance
from pallas_kernels.paged_attention import AttentionGeometry
from pallas_kernels.paged_attention.cases import Case, make_inputs
from pallas_kernels.paged_attention.mosaic_tpu import check_supported, padded_head_dim, paged_attention, tiles
from pallas_kernels.paged_attention.reference import paged_attention_reference

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
    Case(
        name="eight_queries_a_head",
        rows=((0, 1), (130, 1), (7, 9)),
        q_heads=8,
        kv_heads=1,
        head_dim=128,
        block_size=32,
        dtype="bfloat16",
        num_tokens=16,
        has_prefill=True,
    ),
    Case(
        name="multi_head_of_80",
        rows=((60, 1), (3, 4)),
        q_heads=2,
        kv_heads=2,
        head_dim=80,
        block_size=48,
        has_prefill=True,
        sinks=True,
    ),
    Case(name="four_queries_a_head_of_256", rows=DECODES[3:], q_heads=8, kv_heads=2, head_dim=256, sliding_window=130),
    Case(name="scale", rows=DECODES[3:], q_heads=4, kv_heads=2, scale=0.37),
    Case(
        name="scale_and_soft_cap",
        rows=TINY,
        q_heads=7,
        kv_heads=1,
        num_tokens=24,
        has_prefill=True,
        scale=0.2,
        soft_cap=2.0,
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
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of 256 keys, chunks of 128, query tiles of 16 to 32 tokens: the loops go round in small cases too."""
    monkeypatch.setattr(tiles, "MAX_KV_TILE", 256)
    monkeypatch.setattr(tiles, "KV_CHUNK", 128)
    monkeypatch.setattr(tiles, "PREFILL_ROWS", 64)


def in_lanes(values, dtype):
    """A pool [num_blocks, block_size, kv_heads, head_dim] as the TPU holds it; lanes without a head are zeros."""
    num_blocks, block_size, kv_heads, head_dim = values.shape
    padded = padded_head_dim(head_dim)
    lanes = -(-kv_heads * padded // 128) * 128
    out = np.zeros((num_blocks, block_size, kv_heads, padded))
    out[..., :head_dim] = values
    out = np.pad(out.reshape(num_blocks, block_size, -1), ((0, 0), (0, 0), (0, lanes - kv_heads * padded)))
    return jnp.asarray(out, dtype)


@jax.jit(static_argnames=("scale", "sliding_window", "soft_cap", "interpret"))  # cases of one shape compile once
def jitted(q, k_pool, v_pool, metadata, sinks, **static):
    return paged_attention(q, k_pool, v_pool, metadata, sinks=sinks, **static)


def attend(case, inputs, interpret):
    pools = [in_lanes(values, case.dtype) for values in (inputs.k_values, inputs.v_values)]
    out = jitted(
        inputs.q,
        *pools,
        inputs.metadata,
        inputs.sinks,
        **case.options,
        interpret=interpret,
    )
    assert out.dtype == inputs.q.dtype
    return np.asarray(out.astype(jnp.float32))


def expected(case, inputs):
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


def test_refuses_block_tables_that_fill_the_scalar_memory():
    case = Case(name="tables", rows=(), head_dim=128)
    inputs = make_inputs(case, implementation="mosaic_tpu")
    tables = np.zeros((256, 1024), np.int32)
    huge = dataclasses.replace(inputs, metadata=dataclasses.replace(inputs.metadata, block_tables=tables))
    with pytest.raises(NotImplementedError, match="SMEM"):
        attend(case, huge, True)


def test_refuses_pools_of_another_layout():
    case = Case(name="layout", rows=())
    inputs = make_inputs(case, implementation="mosaic_tpu")
    with pytest.raises(ValueError, match="pool_shape"):
        paged_attention(inputs.q, inputs.k_pool, inputs.v_pool, inputs.metadata, scale=1.0, interpret=True)
