"""kv_write for NVIDIA GPUs: values in the Mosaic GPU interpreter, and the program that is lowered for an H100."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.compat import gpu_interpret_params
from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write.cases import CASES, Case
from pallas_kernels.kv_write.mosaic_gpu import kv_write_mosaic_gpu
from pallas_kernels.kv_write.reference import kv_write_reference

OUTSIDE = Case(name="outside", slots=(20, -1, 96, 41, -96, 2**31 - 1), dtype="bfloat16")
MANY = Case(name="several_tiles", slots=tuple(range(95, 15, -2)), kv_heads=8, dtype="bfloat16")


def make_inputs(case):
    rng = np.random.default_rng(0)
    shape = (case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    pools = rng.standard_normal((2, *shape)).astype(jnp.dtype(case.dtype))
    kv = rng.standard_normal((2, len(case.slots), *shape[2:])).astype(pools.dtype)
    return kv, pools, np.asarray(case.slots, np.int32)


def interpret(k, v, k_pool, v_pool, slots):
    params = gpu_interpret_params()
    run = jax.jit(partial(kv_write_mosaic_gpu, interpret=params))
    return [np.asarray(pool) for pool in run(*map(jnp.asarray, (k, v, k_pool, v_pool, slots)))]


@pytest.mark.parametrize("case", [*CASES, MANY], ids=lambda case: case.name)
def test_the_interpreted_kernel_agrees_with_the_reference_outside_of_block_0(case):
    (k, v), (k_pool, v_pool), slots = make_inputs(case)
    written = interpret(k, v, k_pool, v_pool, slots)
    for pool, expected in zip(written, kv_write_reference(k, v, k_pool, v_pool, slots), strict=True):
        assert pool.dtype == expected.dtype
        np.testing.assert_array_equal(pool[1:], expected[1:])


def test_a_slot_outside_the_pool_writes_nothing():
    (k, v), (k_pool, v_pool), slots = make_inputs(OUTSIDE)
    inside = (slots >= 0) & (slots < 96)
    expected = kv_write_reference(k[inside], v[inside], k_pool, v_pool, slots[inside])
    for pool, right in zip(interpret(k, v, k_pool, v_pool, slots), expected, strict=True):
        np.testing.assert_array_equal(pool, right)


def test_float32_values_are_rounded_to_the_pool_dtype():
    (k, v), pools, slots = make_inputs(Case(name="rounded", slots=(17, 40)))
    k_pool, v_pool = (jnp.asarray(pool, jnp.bfloat16) for pool in pools)
    written, _ = interpret(k, v, k_pool, v_pool, slots)
    np.testing.assert_array_equal(written[1, 1], np.asarray(jnp.asarray(k[0]).astype(jnp.bfloat16)))


def lower_for_h100(num_layers: int, num_tokens: int) -> str:
    """StableHLO of several layers that write to donated pools, for a GPU that is described and not there."""

    def step(k, v, pools, slots):
        return [kv_write(k + layer, v, *pool, slots, implementation="mosaic_gpu") for layer, pool in enumerate(pools)]

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    pool = jax.ShapeDtypeStruct((2039, 16, 8, 128), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((num_tokens, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step, donate_argnums=2).trace(kv, kv, [(pool, pool)] * num_layers, slots)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("num_tokens", [1, 100, 256])
def test_lowered_for_an_h100_the_pools_are_aliased_and_nothing_else_makes_one(num_tokens):
    text = lower_for_h100(3, num_tokens)
    makers = [line for line in text.splitlines() if re.search(r"^ *%.*->.*2039x16x8x128", line)]
    assert len(makers) == 3, "each layer makes its pools in one call"
    for line in makers:
        assert "mosaic_gpu" in line
        assert re.findall(r"operand_index = (\d+)", line) == ["3", "4"], "K's pool and V's pool, no other operand"
    assert len(re.findall(r"2039x16x8x128xbf16> \{[^}]*(?:tf\.aliasing_output|jax\.buffer_donor)", text)) == 6


def test_rows_that_a_bulk_copy_cannot_take_are_refused():
    k, slots = jnp.zeros((4, 1, 20), jnp.bfloat16), jnp.zeros(4, jnp.int32)
    pool = jnp.zeros((2, 16, 1, 20), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        kv_write(k, k, pool, pool, slots, implementation="mosaic_gpu")
    wide, pool = jnp.zeros((4, 1, 512), jnp.bfloat16), jnp.zeros((2, 16, 1, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 256"):
        kv_write(wide, wide, pool, pool, slots, implementation="mosaic_gpu")
