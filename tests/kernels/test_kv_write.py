"""kv_write: every case and implementation against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write.cases import CASES
from pallas_kernels.kv_write.reference import kv_write_reference
from pallas_kernels.numerics import logical_dtype, pool_dtype, pool_shape


def make_inputs(case):
    rng = np.random.default_rng(0)
    stored = pool_dtype(case.dtype, jax.default_backend())
    shape = pool_shape(case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    pools = rng.standard_normal((2, *shape)).astype(logical_dtype(stored))
    kv = rng.standard_normal((2, len(case.slots), *shape[2:])).astype(pools.dtype)
    return kv, pools, np.asarray(case.slots, np.int32), stored


@pytest.mark.parametrize("implementation", ["xla", "native_cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference_outside_of_block_0(case, implementation):
    (k, v), (k_pool, v_pool), slots, stored = make_inputs(case)
    written = kv_write(
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.asarray(k_pool.view(stored)),
        jnp.asarray(v_pool.view(stored)),
        jnp.asarray(slots),
        implementation=implementation,
    )
    for pool, reference in zip(written, kv_write_reference(k, v, k_pool, v_pool, slots), strict=True):
        assert pool.dtype == stored
        np.testing.assert_array_equal(np.asarray(pool)[1:], reference.view(stored)[1:])


def test_the_cases_have_each_head_dimension_block_size_and_dtype():
    assert {case.head_dim for case in CASES} == {64, 80, 96, 128, 256}
    assert {case.block_size for case in CASES} == {16, 32, 64, 128, 256}
    assert {case.dtype for case in CASES} == {"float32", "bfloat16", "float16"}


def test_float32_values_are_rounded_to_the_nearest_bfloat16():
    pool = jnp.zeros(pool_shape(2, 16, 1, 64), jnp.uint16)
    k = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 64)), jnp.float32)
    written, _ = kv_write(k, k, pool, pool, jnp.asarray([16, 17], jnp.int32))
    stored = jax.lax.bitcast_convert_type(written[1, :2], jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(k.astype(jnp.bfloat16)))


def test_wrong_arguments_raise_value_error():
    pool = jnp.zeros(pool_shape(2, 16, 3, 64), jnp.float32)
    k, slots = jnp.zeros((4, 3, 64)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="must both be"):
        kv_write(k, k[:2], pool, pool, slots)
    with pytest.raises(ValueError, match="pools of 2 KV heads of 64 are"):
        kv_write(k[:, :2], k[:, :2], pool, pool, slots)
    with pytest.raises(ValueError, match="slots must be"):
        kv_write(k, k, pool, pool, slots[:2])
    with pytest.raises(ValueError, match="one dtype"):
        kv_write(k, k, pool, pool.astype(jnp.float16), slots)
    with pytest.raises(ValueError, match="unknown implementation"):
        kv_write(k, k, pool, pool, slots, implementation="triton")
