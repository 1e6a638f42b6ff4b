"""kv_write for TPUs: values in Pallas' interpreters, races, and the pools that it leaves alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_write import mosaic_tpu
from pallas_kernels.kv_write.cases import CASES, Case
from pallas_kernels.kv_write.reference import kv_write_reference
from pallas_kernels.paged_attention.mosaic_tpu import padded_head_dim, pool_shape
from tests.kernels import interpreted
from tests.kernels.left_out import not_missed

OUTSIDE = Case(name="outside", slots=(20, -1, 96, 41, -96, 2**31 - 1), dtype="bfloat16")
# Runs of a whole tile, of a part, and of one token; more of them than fetches are under way at once.
MANY = Case(
    name="more_runs_than_buffers",
    slots=(*range(16, 29), *range(40, 48), *range(64, 900, 16), 7, 7),
    num_blocks=60,
    head_dim=128,
    dtype="bfloat16",
)
RACES = Case(name="races", slots=(*range(20, 34), 40, 57, 70, 90), dtype="bfloat16")
PADDED_HEADS = Case(name="padded_heads", slots=(17, 18, 40), head_dim=80, kv_heads=2)


def make_inputs(case):
    """New K and V, pools as the reference has them, and slots."""
    rng = np.random.default_rng(0)
    shape = (case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    pools = rng.standard_normal((2, *shape)).astype(jnp.dtype(case.dtype))
    kv = rng.standard_normal((2, len(case.slots), *shape[2:])).astype(pools.dtype)
    return kv, pools, np.asarray(case.slots, np.int32)


def in_lanes(case, pool):
    """A pool of heads as the TPU holds it, with nan in the lanes that hold no head."""
    padded = padded_head_dim(case.head_dim)
    lanes = np.full((*pool.shape[:3], padded), np.nan, pool.dtype)
    lanes[..., : case.head_dim] = pool
    out = np.full(pool_shape(*pool.shape), np.nan, pool.dtype)
    out[..., : case.kv_heads * padded] = lanes.reshape(*pool.shape[:2], -1)
    return out


def in_heads(case, pool):
    """Undoes `in_lanes`."""
    padded = padded_head_dim(case.head_dim)
    heads = pool[..., : case.kv_heads * padded].reshape(*pool.shape[:2], case.kv_heads, padded)
    return heads[..., : case.head_dim]


def write(case, interpret):
    (k, v), pools, slots = make_inputs(case)
    run = jax.jit(partial(mosaic_tpu.kv_write_mosaic_tpu, interpret=interpret))
    written = run(k, v, *(jnp.asarray(in_lanes(case, pool)) for pool in pools), slots)
    return [in_heads(case, np.asarray(pool)) for pool in written]


def expected(case):
    (k, v), (k_pool, v_pool), slots = make_inputs(case)
    inside = (slots >= case.block_size) & (slots < case.num_blocks * case.block_size)
    return kv_write_reference(k[inside], v[inside], k_pool, v_pool, slots[inside])


@pytest.mark.parametrize(
    "case",
    [*(case for case in CASES if "mosaic_tpu" not in case.refused_by), PADDED_HEADS, OUTSIDE],
    ids=lambda case: case.name,
)
def test_agrees_with_the_reference_and_leaves_block_0_alone(case):
    for pool, right in zip(write(case, True), expected(case), strict=True):
        assert pool.dtype == right.dtype
        np.testing.assert_array_equal(pool, right)


def test_runs_over_several_steps_of_the_grid_agree_with_the_reference(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "CHUNK_BYTES", 16 * 4 * 384)  # 16 tokens: the run of tokens 13..20 is cut
    for pool, right in zip(write(MANY, True), expected(MANY), strict=True):
        np.testing.assert_array_equal(pool, right)


@pytest.mark.parametrize("depth", [2, 16])
def test_copies_do_not_race(depth, monkeypatch, capfd):
    monkeypatch.setattr(mosaic_tpu, "DEPTH", depth)
    for pool, right in zip(write(RACES, pltpu.InterpretParams(detect_races=True)), expected(RACES), strict=True):
        np.testing.assert_array_equal(pool, right)
    assert "RACE" not in capfd.readouterr().out


def test_each_wait_is_missed_when_it_is_left_out(monkeypatch, capfd):
    monkeypatch.setattr(mosaic_tpu, "DEPTH", 2)

    def fails():
        try:
            written = write(RACES, pltpu.InterpretParams(detect_races=True))
        except jax.errors.JaxRuntimeError:
            written = [np.nan, np.nan]
        return "RACE" in capfd.readouterr().out or not all(map(np.array_equal, written, expected(RACES)))

    assert not not_missed(fails, interpreted.watch_tpu_copies)


def test_refuses_pools_it_cannot_address():
    for case in CASES:
        if "mosaic_tpu" in case.refused_by:
            with pytest.raises(NotImplementedError, match="takes bfloat16 and float32"):
                write(case, True)
    with pytest.raises(NotImplementedError, match="multiples of 8"):
        write(Case(name="blocks_of_12", slots=(20,), block_size=12), True)
