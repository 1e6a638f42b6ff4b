"""The GPU decode kernel in the Mosaic GPU interpreter against the float64 reference; unread slots hold NaN.

Products are plain dots in the interpreter (`product.Warpgroup`); all else is the kernel's own code. The cases are few
and each asks for several things, since each compiles for seconds.
"""

import dataclasses
import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import cuda_runtime_version
from pallas_kernels.numerics import from_storage, tolerance
from pallas_kernels.paged_attention import AttentionGeometry, choose_implementation
from pallas_kernels.paged_attention.cases import Case, Inputs, expected, make_inputs
from pallas_kernels.paged_attention.mosaic_gpu import (
    attention,
    build_plan,
    check_supported,
    paged_attention,
    plan_shapes,
)
from pallas_kernels.paged_attention.mosaic_gpu.decode import paged_decode
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import build_decode_plan, decode_sizes
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import MAX_DECODE_BUCKET
from pallas_kernels.paged_attention.mosaic_gpu.tiles import DecodeTiles
from tests.kernels import interpreted

pytest_plugins = ("tests.kernels.gpu_interpreter",)
pytestmark = pytest.mark.usefixtures("few_reads_at_once")

_ONES = ((0, 1), (14, 1), (15, 1), (63, 1), (64, 1))  # one token; one short of a block; a block; a tile; a tile and one
_LONG = ((0, 1), (300, 1), (130, 1))  # with few multiprocessors the second is split

_bf16 = functools.partial(Case, dtype="bfloat16", kv_heads=1, q_heads=4)
CASES = (
    _bf16(name="no_rows", rows=(), num_tokens=2),
    _bf16(name="edges_of_blocks_and_tiles", rows=_ONES, q_heads=2, kv_heads=2, num_tokens=6, num_rows=6),
    _bf16(name="split_rows_with_sinks", rows=_LONG, q_heads=5, sinks=True),
    _bf16(
        name="window_and_cap_over_splits",
        rows=_LONG,
        q_heads=8,
        kv_heads=2,
        head_dim=80,
        block_size=32,
        sliding_window=150,
        soft_cap=2.0,
        shared_blocks=3,
    ),
    _bf16(
        name="verified_tokens",
        rows=((0, 5), (300, 4), (160, 1), (3, 2)),
        num_tokens=16,
        has_prefill=True,
        sliding_window=100,
        sinks=True,
        shared_blocks=1,
    ),
    _bf16(name="tiles_of_three_tokens", rows=((300, 2), (14, 1)), q_heads=5, num_tokens=3, has_prefill=True),
    _bf16(
        name="sixteen_tokens_of_one_row",
        rows=((180, 16), (0, 3)),
        q_heads=9,
        head_dim=96,
        block_size=192,
        num_tokens=24,
        has_prefill=True,
        dtype="float16",
    ),
)
BY_NAME = {case.name: case for case in CASES}


def decode(case: Case, inputs: Inputs, *, num_sms: int = 3, tiles: DecodeTiles | None = None) -> np.ndarray:
    rows, blocks_per_seq = inputs.block_tables.shape
    tables = np.zeros((case.num_rows, blocks_per_seq), np.int32)
    tables[:rows] = inputs.block_tables
    sizes = decode_sizes(
        geometry=case.geometry,
        num_tokens=case.num_tokens,
        num_rows=case.num_rows,
        blocks_per_seq=blocks_per_seq,
        has_prefill=case.has_prefill,
        num_sms=num_sms,
    )
    (plan,) = build_decode_plan(
        case.query_lens, case.kv_lens, geometry=case.geometry, sizes=sizes, num_tokens=case.num_tokens
    )
    run = functools.partial(
        paged_decode,
        **case.options,
        sinks=inputs.sinks,
        tiles=tiles,
        interpret=interpreted.gpu(),
    )
    out = jax.jit(run)(inputs.q, from_storage(inputs.k_pool), from_storage(inputs.v_pool), tables, plan)
    assert out.dtype == inputs.q.dtype
    return np.asarray(out.astype(jnp.float32))


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference_whatever_unread_slots_hold(case):
    inputs = make_inputs(case, unread=np.nan)
    np.testing.assert_allclose(decode(case, inputs), expected(case, inputs), **tolerance(case.dtype))


@pytest.mark.usefixtures("compiled_once")
def test_a_ring_that_wraps_and_tiles_of_several_sizes_change_no_result():
    case = BY_NAME["split_rows_with_sinks"]
    inputs = make_inputs(case, unread=np.nan)
    for tiles in (DecodeTiles(kv_tile=64, stages=2, query_stages=1), DecodeTiles(kv_tile=128, stages=3)):
        out = decode(case, inputs, num_sms=2, tiles=tiles)
        np.testing.assert_allclose(out, expected(case, inputs), **tolerance(case.dtype))


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("num_tokens", [MAX_DECODE_BUCKET, MAX_DECODE_BUCKET + 8])
def test_long_rows_are_tiles_of_the_decode_kernel_in_a_small_step_and_the_prefill_kernels_in_a_large_one(
    num_tokens, monkeypatch
):
    monkeypatch.setattr(attention, "decode_sizes", functools.partial(decode_sizes, num_sms=2))  # to interpret
    case = _bf16(name="mixed", rows=((40, 1), (130, 20), (0, 3)), num_tokens=num_tokens, has_prefill=True)
    inputs = make_inputs(case, unread=np.nan, implementation="mosaic_gpu")
    assert (inputs.metadata.plan.prefill is None) == (num_tokens <= MAX_DECODE_BUCKET)
    out = interpreted.on_gpu(case, inputs)
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), expected(case, inputs), **tolerance(case.dtype))


def test_a_plan_has_the_shapes_that_were_announced():
    geometry = dataclasses.replace(BY_NAME["verified_tokens"].geometry, sliding_windows=(None, 100))
    for query_lens, num_tokens, has_prefill in (([1, 1], 40, False), ([1, 30, 2], 40, True), ([1, 30, 2], 72, True)):
        bucket = {"geometry": geometry, "num_tokens": num_tokens, "num_rows": 4, "blocks_per_seq": 8}
        bucket |= {"has_prefill": has_prefill}
        tables = np.ones((len(query_lens), 8), np.int32)
        plan = build_plan(np.asarray(query_lens), np.asarray([90] * len(query_lens)), tables, **bucket)
        announced = plan_shapes(**bucket)
        assert jax.tree.structure(plan) == jax.tree.structure(announced)
        for leaf, shape in zip(jax.tree.leaves(plan), jax.tree.leaves(announced), strict=True):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


def test_a_window_that_was_not_planned_for_is_refused():
    case = BY_NAME["split_rows_with_sinks"]
    inputs = make_inputs(case, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="not for 7"):
        paged_attention(inputs.q, inputs.k_pool, inputs.v_pool, inputs.metadata, scale=1.0, sliding_window=7)


@pytest.mark.parametrize(
    "change", [{"head_dim": 72}, {"block_size": 48}, {"block_size": 8}, {"dtype": "float32"}, {"q_heads": 136}]
)
def test_what_the_kernels_cannot_do_is_refused_by_name(change):
    geometry = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    check_supported(geometry)
    with pytest.raises(NotImplementedError, match="mosaic_gpu takes"):
        check_supported(dataclasses.replace(geometry, **change))


def gpu_of(compute_capability: str) -> SimpleNamespace:
    """A device as JAX describes one, here or of a topology."""
    return SimpleNamespace(platform="gpu", device_kind="the GPU", compute_capability=compute_capability)


@pytest.mark.parametrize("compute_capability", ["7.5", "8.0", "8.9", "9.0", "9.1", "10.0", "12.0", "gfx942"])
def test_a_gpu_without_wgmma_is_served_by_xla_with_the_reason(monkeypatch, compute_capability):
    monkeypatch.setattr(attention, "cuda_runtime_version", lambda: 13000)
    geometry = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    device = gpu_of(compute_capability)
    if compute_capability.startswith("9."):
        assert choose_implementation(None, geometry, device=device) == ("mosaic_gpu", [])
        assert choose_implementation("mosaic_gpu", geometry, device=device) == ("mosaic_gpu", [])
        return
    chosen, (reason,) = choose_implementation(None, geometry, device=device)
    assert chosen == "xla"
    assert reason.startswith("mosaic_gpu: ") and reason.endswith(f"and the GPU has {compute_capability}")
    with pytest.raises(NotImplementedError, match=f"Hopper GPUs alone .* the GPU has {compute_capability}"):
        choose_implementation("mosaic_gpu", geometry, device=device)


def test_a_gpu_that_does_not_say_what_it_is_is_served_by_xla():
    device = jax.sharding.AbstractDevice(device_kind="the GPU", num_cores=1, platform="gpu")
    geometry = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    chosen, (reason,) = choose_implementation(None, geometry, device=device)
    assert chosen == "xla" and reason.endswith("the GPU has an unknown one")


@pytest.mark.parametrize(("version", "is_broken"), [(12060, False), (12080, True), (12090, True), (13000, False)])
def test_a_cuda_that_miscompiles_causal_masks_is_passed_over_with_its_reason(monkeypatch, version, is_broken):
    monkeypatch.setattr(attention, "cuda_runtime_version", lambda: version)
    geometry = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
    chosen, refusals = choose_implementation(None, geometry, device=gpu_of("9.0"))
    assert chosen == ("xla" if is_broken else "mosaic_gpu")
    assert all("ptxas miscompiles causal masks" in reason for reason in refusals) and bool(refusals) == is_broken
    if is_broken:
        with pytest.raises(NotImplementedError, match=r"CUDA 12\.[89]: .* install jaxserve\[cuda13\]"):
            choose_implementation("mosaic_gpu", geometry, device=gpu_of("9.0"))


_PLUGIN = SimpleNamespace(cuda_runtime_get_version=lambda: 13000)


@pytest.mark.parametrize(("plugin", "version"), [(None, None), (_PLUGIN, 13000)])
def test_the_version_of_cuda_is_that_of_the_plugin(monkeypatch, plugin, version):
    monkeypatch.setattr(importlib.import_module("jax._src.lib"), "cuda_versions", plugin)
    assert cuda_runtime_version() == version


def test_tiles_that_no_kernel_has_are_refused():
    with pytest.raises(ValueError, match="kv_tile"):
        DecodeTiles(kv_tile=32, stages=4)
