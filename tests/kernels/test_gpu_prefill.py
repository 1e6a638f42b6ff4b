"""Prefill for NVIDIA GPUs: values of the interpreted kernel, and the program that is lowered for an H100."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels.numerics import from_storage, tolerance
from pallas_kernels.paged_attention.cases import Case, expected, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu.prefill import prefill
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import (
    MAX_DECODE_TOKENS,
    build_prefill_plan,
    check_prefill_supported,
    prefill_plan_shapes,
)
from pallas_kernels.paged_attention.mosaic_gpu.tiles import HEAD_DIMS, PrefillTiles
from tests.kernels import interpreted

pytest_plugins = ("tests.kernels.gpu_interpreter",)
UNWRITTEN = 7.0
case = partial(Case, dtype="bfloat16", num_tokens=64, num_rows=2, kv_heads=1, q_heads=4, has_prefill=True)
CASES = (
    case(name="from_nothing", rows=((0, 40),)),
    case(name="full_blocks", rows=((0, 32),), num_tokens=32),
    case(name="full_blocks_and_one", rows=((0, 33),)),
    case(name="one_token_over_a_tile_of_keys", rows=((96, 33),), head_dim=128),
    case(name="continues_a_chunk", rows=((150, 40),)),
    case(
        name="several_rows_between_decodes",
        rows=((30, 1), (0, 17), (130, 40), (200, 16), (3, 20)),
        num_tokens=100,
        num_rows=8,
        kv_heads=2,
        q_heads=8,
    ),
    case(name="shared_blocks", rows=((150, 20), (140, 18)), shared_blocks=8),
    case(name="more_tiles_than_stages", rows=((350, 34),), head_dim=128),
    case(name="five_heads", rows=((9, 20),), q_heads=5),
    case(name="window", rows=((300, 50), (0, 30)), num_tokens=80, sliding_window=100),
    case(name="window_of_one", rows=((120, 40),), sliding_window=1),
)


def attend(case, unread=np.nan, tiles=None):
    """The interpreted kernel's result, the reference's, and which tokens the kernel owns."""
    inputs = make_inputs(case, unread=unread)
    query_lens, kv_lens = np.asarray(case.query_lens, np.int32), np.asarray(case.kv_lens, np.int32)
    starts = np.concatenate(([0], np.cumsum(query_lens)))
    sizes = {"geometry": case.geometry, "num_tokens": case.num_tokens, "num_rows": case.num_rows}
    plan = build_prefill_plan(query_lens, kv_lens, starts, **sizes)
    run = partial(prefill, **case.options, tiles=tiles, interpret=interpreted.gpu())
    pools = from_storage(inputs.k_pool), from_storage(inputs.v_pool)
    tables, lens = inputs.metadata.block_tables, inputs.metadata.kv_lens
    out = jax.jit(run)(inputs.q, *pools, jnp.full_like(inputs.q, UNWRITTEN), tables, lens, plan, sinks=inputs.sinks)
    owned = np.zeros(case.num_tokens, bool)
    owned[: starts[-1]] = np.repeat(query_lens > MAX_DECODE_TOKENS, query_lens)
    return np.asarray(out.astype(jnp.float32)), expected(case, inputs), owned


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_interpreted_kernel_agrees_with_the_reference_and_writes_its_own_tokens_only(case, compiled_once):
    out, right, owned = attend(case)
    assert owned.any()
    np.testing.assert_allclose(out[owned], right[owned], **tolerance(case.dtype))
    np.testing.assert_array_equal(out[~owned], UNWRITTEN)


def test_tiles_change_no_more_than_rounding(compiled_once):
    over = CASES[3]
    tiles = PrefillTiles(block_kv=64, stages=2)
    out, right, owned = attend(over, tiles=tiles)
    np.testing.assert_allclose(out[owned], right[owned], **tolerance(over.dtype))


@pytest.mark.parametrize("change", [{"head_dim": 72}, {"dtype": "float32"}, {"block_size": 12}], ids=str)
def test_refuses_what_it_cannot_compute(change):
    geometry = dataclasses.replace(case(name="any", rows=()).geometry, **change)
    with pytest.raises(NotImplementedError, match="mosaic_gpu prefill takes"):
        check_prefill_supported(geometry)


def lower_for_h100(case: Case) -> str:
    shape = jax.ShapeDtypeStruct
    dtype = jnp.dtype(case.dtype)
    q = shape((case.num_tokens, case.q_heads, case.head_dim), dtype)
    pool = shape((64, case.block_size, case.kv_heads, case.head_dim), dtype)
    plan = prefill_plan_shapes(geometry=case.geometry, num_tokens=case.num_tokens, num_rows=case.num_rows)
    tables, lens = shape((case.num_rows, 32), jnp.int32), shape((case.num_rows,), jnp.int32)
    run = partial(prefill, **case.options)
    h100 = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(run, donate_argnums=3).trace(q, pool, pool, q, tables, lens, plan)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_lowers_for_h100_in_place(head_dim):
    text = lower_for_h100(case(name="any", rows=(), head_dim=head_dim, num_tokens=512, num_rows=8))
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert "output_operand_alias" in text
    assert "stablehlo.pad" not in text
