"""matmul: every case and implementation against the float64 reference; the native one, row by row, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.cases import CASES
from pallas_kernels.matmul.reference import matmul_reference

IMPLEMENTATIONS = ("xla", "xla_cpu", "native_cpu")


def make_inputs(case):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((case.tokens, case.in_features)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((case.out_features, case.in_features)), jnp.float32)
    return x, weight.astype(case.dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case, implementation):
    x, weight = make_inputs(case)
    y = matmul(x, weight, out_dtype=jnp.float32, implementation=implementation)
    assert y.dtype == jnp.float32
    rounded = np.asarray(x.astype(weight.dtype).astype(jnp.float32))  # what the product is asked for
    expected = matmul_reference(rounded, np.asarray(weight.astype(jnp.float32)))
    np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5, atol=1e-6 * case.in_features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((64, 576)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((100, 576)), jnp.float32).astype(dtype)

    def native(rows):
        return np.asarray(matmul(rows, weight, out_dtype=jnp.float32, implementation="native_cpu"))

    together = native(x)
    for start, stop in ((0, 1), (5, 7), (40, 64)):
        np.testing.assert_array_equal(native(x[start:stop]), together[start:stop])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_is_not_finite_stays_so_and_alone(dtype, value):
    x = jnp.ones((8, 64), jnp.float32).at[3, 5].set(value)
    weight = jnp.ones((32, 64), jnp.dtype(dtype))
    y = np.asarray(matmul(x, weight, out_dtype=jnp.float32, implementation="native_cpu"))
    assert not np.isfinite(y[3]).any()
    np.testing.assert_array_equal(np.delete(y, 3, axis=0), 64.0)


def test_narrow_results_are_rounded():
    x, weight = jnp.ones((4, 64), jnp.bfloat16), jnp.full((16, 64), 1 / 3, jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        y = matmul(x, weight, out_dtype=jnp.bfloat16, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y.astype(jnp.float32)), 64 / 3, rtol=1e-2)


def test_wrong_arguments_are_refused():
    x, weight = jnp.ones((4, 64)), jnp.ones((16, 64))
    with pytest.raises(ValueError, match="must be"):
        matmul(x, weight[:, :32], out_dtype=jnp.float32, implementation="xla")
    with pytest.raises(ValueError, match="unknown implementation 'triton'"):
        matmul(x, weight, out_dtype=jnp.float32, implementation="triton")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="not float16"):
        matmul(x, weight.astype(jnp.float16), out_dtype=jnp.float32, implementation="native_cpu")
