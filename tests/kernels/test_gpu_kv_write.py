"""kv_write and rotate_and_write for NVIDIA GPUs: values in the Mosaic GPU interpreter, programs lowered for an H100."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.compat import gpu_interpret_params
from pallas_kernels.kv_write import kv_write, rotate_and_write
from pallas_kernels.kv_write.cases import CASES, Case
from pallas_kernels.kv_write.mosaic_gpu import kv_write_mosaic_gpu
from pallas_kernels.kv_write.mosaic_gpu_rotation import rotate_and_write_mosaic_gpu
from pallas_kernels.kv_write.reference import kv_write_reference, rotate_and_write_reference
from pallas_kernels.numerics import tolerance

OUTSIDE = Case(name="outside", slots=(20, -1, 96, 41, -96, 2**31 - 1), dtype="bfloat16")
MANY = Case(name="several_tiles", slots=tuple(range(95, 15, -2)), kv_heads=8, dtype="bfloat16")


def make_inputs(case):
    rng = np.random.default_rng(0)
    shape = (case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    pools = rng.standard_normal((2, *shape)).astype(jnp.dtype(case.dtype))
    kv = rng.standard_normal((2, len(case.slots), *shape[2:])).astype(pools.dtype)
    return kv, pools, np.asarray(case.slots, np.int32)


def interpret(k, v, k_pool, v_pool, slots, **params):
    run = jax.jit(partial(kv_write_mosaic_gpu, interpret=gpu_interpret_params(**params)))
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


def make_projections(case, group):
    rng = np.random.default_rng(1)
    _, pools, slots = make_inputs(case)
    shape = (len(slots), case.kv_heads, group + 2, case.head_dim)
    qkv = rng.standard_normal(shape).astype(pools.dtype)
    angles = rng.uniform(-np.pi, np.pi, (len(slots), case.head_dim // 2))
    return qkv, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), *pools, slots


def assert_rotated_and_written(outputs, inputs, dtype):
    """Values and untouched slots bit for bit; what is rotated to the last digit of its dtype."""
    qkv, _, _, k_pool, v_pool, slots = inputs
    inside = (slots >= 0) & (slots < k_pool.shape[0] * k_pool.shape[1])
    q, _, _ = rotate_and_write_reference(*inputs[:5], np.zeros_like(slots))
    _, k_expected, v_expected = rotate_and_write_reference(
        *(x[inside] for x in inputs[:3]), k_pool, v_pool, slots[inside]
    )
    close = tolerance(dtype)
    got = [np.asarray(x) for x in outputs]
    np.testing.assert_allclose(got[0].astype(np.float32), q.astype(np.float32), **close)
    np.testing.assert_allclose(got[1][1:].astype(np.float32), k_expected[1:].astype(np.float32), **close)
    np.testing.assert_array_equal(got[2][1:], v_expected[1:])
    untouched = np.ones(k_pool.shape[0] * k_pool.shape[1], bool)
    untouched[slots[inside]] = False
    rows = (-1, *k_pool.shape[2:])
    np.testing.assert_array_equal(got[1].reshape(rows)[untouched], k_pool.reshape(rows)[untouched])


def interpret_rotation(*inputs, **params):
    run = jax.jit(partial(rotate_and_write_mosaic_gpu, interpret=gpu_interpret_params(**params)))
    return run(*map(jnp.asarray, inputs))


EIGHT = (95, 16, 40, 0, 0, 96, -1, 17)
ROTATED = [
    (Case(name="grouped", slots=EIGHT, dtype="bfloat16"), 3),
    (Case(name="one_query_a_key", slots=EIGHT, kv_heads=1, head_dim=128, dtype="float16"), 1),
    (Case(name="several_tiles", slots=tuple(range(95, 63, -2)), kv_heads=2, head_dim=32, dtype="bfloat16"), 2),
]
# The interpreter of JAX 0.10 does not read past the end of an array, as bulk copies do.
HANGING = [
    (Case(name="one_token", slots=(33,), dtype="bfloat16"), 3),
    (Case(name="a_tile_and_two", slots=(*EIGHT, 18, 19), kv_heads=2, dtype="bfloat16"), 2),
]
ROTATED += HANGING if jax.__version_info__ >= (0, 11) else []


@pytest.mark.parametrize(("case", "group"), ROTATED, ids=lambda value: getattr(value, "name", ""))
def test_the_interpreted_rotation_agrees_with_the_reference(case, group):
    inputs = make_projections(case, group)
    assert_rotated_and_written(interpret_rotation(*inputs), inputs, case.dtype)


@pytest.mark.parametrize(("case", "group"), [*ROTATED[:3], *HANGING], ids=lambda value: getattr(value, "name", ""))
def test_xla_rotates_and_writes_like_the_reference(case, group):
    inputs = make_projections(case, group)
    slots = np.where((inputs[5] < 0) | (inputs[5] >= 96), 0, inputs[5]).astype(np.int32)  # XLA's scatter promises
    inputs = (*inputs[:5], slots)
    assert_rotated_and_written(rotate_and_write(*map(jnp.asarray, inputs), implementation="xla"), inputs, case.dtype)


def test_rotation_checks_its_arguments():
    qkv, cos, sin, *rest = map(jnp.asarray, make_projections(*ROTATED[0]))
    with pytest.raises(ValueError, match="cos and sin must be"):
        rotate_and_write(qkv, cos[:, :-1], sin, *rest)
    with pytest.raises(ValueError, match="qkv must be"):
        rotate_and_write(qkv[:, :, :2], cos, sin, *rest)


def lower_for_h100(step, *operands) -> str:
    """StableHLO of `step`, whose last operand is donated pools, for a GPU that is described and not there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(step, donate_argnums=len(operands) - 1).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_pools_stay_in_place(text: str, *, num_layers: int, aliased_operands: list[str]) -> None:
    makers = [line for line in text.splitlines() if re.search(r"^ *%.*->.*2039x16x8x128", line)]
    assert len(makers) == num_layers, "each layer makes its pools in one call"
    for line in makers:
        assert "mosaic_gpu" in line
        assert re.findall(r"operand_index = (\d+)", line) == aliased_operands, "K's pool and V's pool, and nothing else"
    donated = re.findall(r"2039x16x8x128xbf16> \{[^}]*(?:tf\.aliasing_output|jax\.buffer_donor)", text)
    assert len(donated) == 2 * num_layers


POOL = jax.ShapeDtypeStruct((2039, 16, 8, 128), jnp.bfloat16)


@pytest.mark.parametrize("num_tokens", [1, 100, 256])
def test_lowered_for_an_h100_writes_alias_the_pools_and_nothing_else_makes_one(num_tokens):
    def step(k, v, slots, pools):
        return [kv_write(k + layer, v, *pool, slots, implementation="mosaic_gpu") for layer, pool in enumerate(pools)]

    kv = jax.ShapeDtypeStruct((num_tokens, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    text = lower_for_h100(step, kv, kv, slots, [(POOL, POOL)] * 3)
    assert_pools_stay_in_place(text, num_layers=3, aliased_operands=["3", "4"])


@pytest.mark.parametrize("num_tokens", [1, 100, 256])
def test_lowered_for_an_h100_the_rotation_is_one_kernel_a_layer(num_tokens):
    def step(qkv, cos, sin, slots, pools):
        written = []
        for pool in pools:
            q, *pool = rotate_and_write(qkv, cos, sin, *pool, slots, implementation="mosaic_gpu")
            qkv = qkv.at[:, :, :-2].set(q)
            written.append(pool)
        return qkv, written

    qkv = jax.ShapeDtypeStruct((num_tokens, 8, 6, 128), jnp.bfloat16)
    angles = jax.ShapeDtypeStruct((num_tokens, 64), jnp.float32)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    text = lower_for_h100(step, qkv, angles, angles, slots, [(POOL, POOL)] * 3)
    assert_pools_stay_in_place(text, num_layers=3, aliased_operands=["4", "5"])
    assert "stablehlo.multiply" not in text, "nothing is rotated outside of the kernels"


def test_projections_that_the_kernel_does_not_take_are_rotated_outside_of_it():
    def step(qkv, cos, sin, slots, pools):
        return rotate_and_write(qkv, cos, sin, *pools, slots, implementation="mosaic_gpu")

    qkv = jax.ShapeDtypeStruct((4, 8, 6, 128), jnp.float32)
    angles = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    text = lower_for_h100(step, qkv, angles, angles, jax.ShapeDtypeStruct((4,), jnp.int32), (POOL, POOL))
    assert_pools_stay_in_place(text, num_layers=1, aliased_operands=["3", "4"])
    assert "stablehlo.multiply" in text


def test_rows_that_a_bulk_copy_cannot_take_are_refused():
    k, slots = jnp.zeros((4, 1, 20), jnp.bfloat16), jnp.zeros(4, jnp.int32)
    pool = jnp.zeros((2, 16, 1, 20), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="multiple of 8"):
        kv_write(k, k, pool, pool, slots, implementation="mosaic_gpu")
    wide, pool = jnp.zeros((4, 1, 512), jnp.bfloat16), jnp.zeros((2, 16, 1, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at most 256"):
        kv_write(wide, wide, pool, pool, slots, implementation="mosaic_gpu")
