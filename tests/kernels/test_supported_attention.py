"""paged_attention: all that models may ask for, by every implementation, against the float64 reference; kernels of
other devices are interpreted. And the table of these cases against the list of what is supported."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.numerics import tolerance
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import CASES, SUPPORTED, expected, make_inputs
from pallas_kernels.paged_attention.implementations import implementation_of
from pallas_kernels.paged_attention.mosaic_gpu.prefill_plan import MAX_DECODE_BUCKET, MAX_DECODE_TOKENS
from tests.kernels import interpreted

pytest_plugins = ("tests.kernels.gpu_interpreter",)

IMPLEMENTATIONS = ("xla", "native_cpu", "mosaic_gpu", "mosaic_tpu")
HEAD_DIMS = {64, 80, 96, 128, 256}
BLOCK_SIZES = {16, 32, 64, 128, 256}
SERVED = [
    pytest.param(case, implementation, id=f"{case.name}-{implementation}")
    for case in SUPPORTED
    for implementation in IMPLEMENTATIONS
    if implementation not in case.refused_by
]


def attend(case, inputs, implementation):
    if implementation == "mosaic_gpu":
        return interpreted.on_gpu(case, inputs)
    if implementation == "mosaic_tpu":
        return interpreted.on_tpu(case, inputs)
    return paged_attention(inputs.q, inputs.k_pool, inputs.v_pool, inputs.metadata, sinks=inputs.sinks, **case.options)


@pytest.mark.usefixtures("compiled_once", "few_reads_at_once")
@pytest.mark.parametrize(("case", "implementation"), SERVED)
def test_agrees_with_the_reference_whatever_unread_slots_hold(case, implementation, monkeypatch):
    interpreted.few_multiprocessors(monkeypatch)
    interpreted.small_tiles_of_tpu(monkeypatch)
    inputs = make_inputs(case, implementation=implementation, unread=np.nan)
    out = attend(case, inputs, implementation)
    assert out.dtype == inputs.q.dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected(case, inputs), **tolerance(case.dtype))


def test_the_table_has_each_number_of_query_heads_and_each_head_dimension_in_float16():
    groups = [case.geometry.group for case in SUPPORTED if case.dtype == "bfloat16"]
    assert sorted(groups) == [*range(1, 17)]
    assert sorted(case.head_dim for case in SUPPORTED if case.dtype == "float16") == sorted(HEAD_DIMS)


@pytest.mark.parametrize("kind", ["decodes", "small", "mixed"])
def test_each_kind_of_step_has_all_head_dimensions_block_sizes_and_options(kind):
    cases = [case for case in SUPPORTED if kind_of(case) == kind]
    assert {case.head_dim for case in cases} == HEAD_DIMS
    assert {case.block_size for case in cases} == BLOCK_SIZES
    asked = {name for case in cases for name, value in options_of(case).items() if value}
    assert asked == {"scale", "sliding_window", "soft_cap", "sinks"}


def test_all_options_are_asked_for_at_once_with_each_head_dimension():
    at_once = {"sliding_window", "soft_cap", "sinks"}
    cases = [case for case in SUPPORTED if all(options_of(case)[name] for name in at_once)]
    assert {case.head_dim for case in cases if kind_of(case) == "mixed"} == HEAD_DIMS


def kind_of(case):
    """By the kernels of a GPU: rows of one token; the decode kernel with longer rows; both kernels."""
    if not case.has_prefill:
        return "decodes"
    assert 16 in case.query_lens, "as many tokens as a row with drafts has at most"
    assert max(case.query_lens) > MAX_DECODE_TOKENS
    return "small" if case.num_tokens <= MAX_DECODE_BUCKET else "mixed"


def options_of(case):
    return {name: getattr(case, name) for name in ("scale", "sliding_window", "soft_cap", "sinks")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_names_the_implementations_that_refuse_it(case):
    refusing = []
    for implementation in IMPLEMENTATIONS:
        geometry = case.geometry
        if implementation == "mosaic_gpu" and case.dtype == "float32":  # a GPU runs them in bfloat16
            geometry = dataclasses.replace(geometry, dtype="bfloat16")
        try:
            implementation_of(implementation).check_supported(geometry)
        except NotImplementedError:
            refusing.append(implementation)
    assert tuple(refusing) == case.refused_by
