"""paged_attention: every case and implementation against the float64 reference, and what may not change a result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.numerics import tolerance
from pallas_kernels.paged_attention import (
    build_metadata,
    choose_implementation,
    metadata_shapes,
    paged_attention,
)
from pallas_kernels.paged_attention.cases import BATCHES, Case, Inputs, expected, make_inputs

pytestmark = pytest.mark.usefixtures("compiled_as_served")

IMPLEMENTATIONS = ("xla", "native_cpu")
SERVED = [
    pytest.param(case, implementation, id=f"{case.name}-{implementation}")
    for case in BATCHES
    for implementation in IMPLEMENTATIONS
    if implementation not in case.refused_by
]
BY_NAME = {case.name: case for case in BATCHES}
CPU = jax.devices()[0]


def attend(case: Case, inputs: Inputs) -> np.ndarray:
    out = paged_attention(
        inputs.q,
        inputs.k_pool,
        inputs.v_pool,
        inputs.metadata,
        **case.options,
        sinks=inputs.sinks,
    )
    assert out.dtype == inputs.q.dtype
    return np.asarray(out.astype(jnp.float32))


@pytest.mark.parametrize(("case", "implementation"), SERVED)
def test_agrees_with_the_reference(case, implementation):
    inputs = make_inputs(case, implementation=implementation)
    np.testing.assert_allclose(attend(case, inputs), expected(case, inputs), **tolerance(case.dtype))


@pytest.mark.parametrize("unread", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        param
        for param in SERVED
        if param.values[0].name
        in {"decodes_and_prefills", "sliding_window", "padding_rows_and_tokens", "window_in_a_small_bucket", "float16"}
    ],
)
def test_slots_that_nobody_may_read_never_leak(case, unread, implementation):
    if case.dtype == "float16":
        unread = np.float16(6e4) if unread == 1e30 else unread
    clean, dirty = (
        make_inputs(case, implementation=implementation),
        make_inputs(case, implementation=implementation, unread=float(unread)),
    )
    np.testing.assert_array_equal(attend(case, clean), attend(case, dirty))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_tokens_get_zeros_whatever_their_queries(implementation):
    case = BY_NAME["decodes_and_prefills"]
    inputs = make_inputs(case, implementation=implementation)
    num_tokens = sum(case.query_lens)
    dirty = dataclasses.replace(inputs, q=inputs.q.at[num_tokens:].set(jnp.nan))
    out = attend(case, dirty)
    assert not out[num_tokens:].any()
    np.testing.assert_array_equal(out, attend(case, inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decode_row_gets_the_same_bits_alone_and_in_a_batch(implementation):
    batch = BY_NAME["more_rows_than_a_group"]
    inputs = make_inputs(batch, implementation=implementation)
    together = attend(batch, inputs)
    for row in (0, 11, 19):
        metadata = build_metadata(
            [1],
            batch.kv_lens[row : row + 1],
            inputs.block_tables[row : row + 1],
            geometry=batch.geometry,
            implementation=implementation,
            num_tokens=8,
            num_rows=8,
        )
        q = jnp.zeros((8, *inputs.q.shape[1:]), inputs.q.dtype).at[0].set(inputs.q[row])
        alone = attend(batch, dataclasses.replace(inputs, q=q, metadata=metadata))
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_in_chunks_gets_what_it_gets_at_once(implementation):
    whole = Case(name="whole", rows=((0, 130),), num_tokens=136, num_rows=4, has_prefill=True)
    inputs = make_inputs(whole, implementation=implementation)
    at_once = attend(whole, inputs)
    for computed, new in ((0, 50), (50, 79), (129, 1)):
        metadata = build_metadata(
            [new],
            [computed + new],
            inputs.block_tables,
            geometry=whole.geometry,
            implementation=implementation,
            num_tokens=136,
            num_rows=4,
        )
        q = jnp.zeros_like(inputs.q).at[:new].set(inputs.q[computed : computed + new])
        chunk = attend(whole, dataclasses.replace(inputs, q=q, metadata=metadata))
        np.testing.assert_allclose(chunk[:new], at_once[computed : computed + new], **tolerance("float32"))


@pytest.mark.parametrize(("case", "implementation"), SERVED)
def test_metadata_has_the_shapes_that_were_announced(case, implementation):
    metadata = make_inputs(case, implementation=implementation).metadata
    announced = metadata_shapes(
        geometry=case.geometry,
        implementation=implementation,
        num_tokens=case.num_tokens,
        num_rows=case.num_rows,
        blocks_per_seq=metadata.block_tables.shape[1],
        has_prefill=case.has_prefill,
    )
    assert jax.tree.structure(metadata) == jax.tree.structure(announced)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (metadata, announced)]
    assert shapes[0] == shapes[1]


def test_a_cpu_is_served_by_its_native_kernels_and_xla_where_they_do_not_fit():
    geometry = BY_NAME["block_edges"].geometry
    assert choose_implementation(None, geometry, device=CPU) == ("native_cpu", [])
    half = BY_NAME["float16"].geometry
    refusal = "native_cpu: pools are float32 or bfloat16, not float16"
    assert choose_implementation(None, half, device=CPU) == ("xla", [refusal])
    with pytest.raises(NotImplementedError, match="not float16"):
        choose_implementation("native_cpu", half, device=CPU)
    gpu = jax.sharding.AbstractDevice(device_kind="some GPU", num_cores=1, platform="gpu")
    assert choose_implementation("xla", geometry, device=gpu) == ("xla", [])


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu"])
def test_an_implementation_of_another_device_is_refused_by_name(implementation):
    with pytest.raises(NotImplementedError, match=f"'{implementation}' does not run on cpu"):
        choose_implementation(implementation, BY_NAME["block_edges"].geometry, device=CPU)


def test_wrong_arguments_raise_value_error():
    case = BY_NAME["block_edges"]
    inputs = make_inputs(case)
    wrong = {
        "6 query heads of 64": {"q": inputs.q[:, :5]},
        "q has 6 of 32": {"q": inputs.q[..., :32]},
        "8 tokens": {"q": inputs.q[:4]},
        "one dtype": {"k_pool": inputs.k_pool[:-1]},
        "KV heads of 64 are": {"k_pool": inputs.k_pool[:, :, :1], "v_pool": inputs.v_pool[:, :, :1]},
        "blocks of 16": {"k_pool": inputs.k_pool[:, :8], "v_pool": inputs.v_pool[:, :8]},
        "not supported": {"k_pool": inputs.k_pool.astype(jnp.int8), "v_pool": inputs.v_pool.astype(jnp.int8)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            attend(case, dataclasses.replace(inputs, **change))
    with pytest.raises(ValueError, match="sliding_window"):
        attend(dataclasses.replace(case, sliding_window=0), inputs)
    for scale in (0.0, -0.125, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
            attend(dataclasses.replace(case, scale=scale), inputs)
    with pytest.raises(ValueError, match="soft_cap"):
        attend(dataclasses.replace(case, soft_cap=0.0), inputs)
    with pytest.raises(ValueError, match="unknown implementation 'triton'"):
        make_inputs(case, implementation="triton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sinks must be float32\[6\]"):
        attend(case, dataclasses.replace(inputs, sinks=jnp.zeros(5)))
