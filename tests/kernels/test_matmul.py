"""matmul: every case and implementation against the float64 reference; the native one, row by row, to the bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import native
from pallas_kernels.matmul import matmul, panel_rows, to_panels
from pallas_kernels.matmul.cases import CASES
from pallas_kernels.matmul.native_cpu import MAX_TOKENS
from pallas_kernels.matmul.reference import matmul_reference

pytestmark = pytest.mark.usefixtures("compiled_as_served")

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


PRODUCTS = ("xla", "xla_cpu", "native_cpu", "panels")
AROUND = ("plain", "norm", "gate", "residual", "norm residual")


def product_of(kind, around, x, weight, norm, residual, out_dtype=jnp.float32, num_tokens=None):
    """The product with what `around` names; a gate takes both halves of the weight [2, ..], others one matrix."""
    matrix = weight if "gate" in around else weight.reshape(-1, weight.shape[-1])
    if kind == "panels":
        matrix = jnp.asarray(to_panels(np.asarray(matrix), native.panel_columns(matrix.dtype)))
    return matmul(
        x,
        matrix,
        out_dtype=out_dtype,
        implementation="native_cpu" if kind == "panels" else kind,
        norm=norm if "norm" in around else None,
        epsilon=1e-5,
        residual=residual if "residual" in around else None,
        num_tokens=num_tokens,
        panels=kind == "panels",
    )


def skip_where_there_are_no_panels(kind, dtype):
    if kind == "panels" and not native.panel_columns(dtype):
        pytest.skip(f"no panels of {dtype} on this processor")


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_stands_around_a_product_agrees_with_the_reference(dtype, around, tokens, kind):
    skip_where_there_are_no_panels(kind, dtype)
    rng = np.random.default_rng(2)
    x, residual = (rng.standard_normal((tokens, width)).astype(np.float32) for width in (96, 2 * 83))
    norm = jnp.asarray(rng.standard_normal(96), dtype)
    weight = jnp.asarray(rng.standard_normal((2, 83, 96)) / 8, dtype)
    y = product_of(kind, around, jnp.asarray(x), weight, norm, jnp.asarray(residual))
    if "norm" in around:
        x = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-5) * np.asarray(norm, np.float64)
    rounded = np.asarray(jnp.asarray(x, jnp.float32).astype(dtype).astype(jnp.float32))
    expected = matmul_reference(rounded, np.asarray(weight.astype(jnp.float32)).reshape(-1, 96))
    if "gate" in around:
        gate, up = np.split(expected, 2, axis=1)
        expected = gate / (1 + np.exp(-gate)) * up
    if "residual" in around:
        expected = expected + residual
    loose = 2e-2 if dtype == "bfloat16" and "norm" in around else 1e-4  # a norm's last bit may round x elsewhere
    np.testing.assert_allclose(np.asarray(y), expected, rtol=loose, atol=loose)


@pytest.mark.parametrize("around", ["norm", "gate", "residual"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in ("native_cpu", "panels") for dtype in ("float32", "bfloat16")]
)
@pytest.mark.parametrize(("depth", "width"), [(2112, 100), (72, 19)])
def test_a_row_gets_the_same_bits_alone_and_in_a_batch(depth, width, kind, dtype, around):
    skip_where_there_are_no_panels(kind, dtype)
    rng = np.random.default_rng(1)
    has_no_limit = kind == "panels" or (dtype == "bfloat16" and native.has_tiles())
    num_tokens = 150 if has_no_limit else MAX_TOKENS
    x, residual = (jnp.asarray(rng.standard_normal((num_tokens, size)), jnp.float32) for size in (depth, 2 * width))
    weight = jnp.asarray(rng.standard_normal((2, width, depth)), dtype)
    norm = jnp.asarray(rng.standard_normal(depth), dtype)

    def product(start, stop):
        rows = slice(start, stop)
        y = product_of(kind, around, x[rows], weight, norm, residual[rows], jnp.dtype(dtype))
        return np.asarray(y.astype(jnp.float32))

    together = product(0, num_tokens)
    for start, stop in ((0, 1), (5, 7), (20, 37), (0, 64), (30, num_tokens)):
        np.testing.assert_array_equal(product(start, stop), together[start:stop])


@pytest.mark.parametrize("around", ["plain", "gate", "norm residual"])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("xla", "float32")] + [(kind, dtype) for kind in ("native_cpu", "panels") for dtype in ("float32", "bfloat16")],
)
def test_rows_of_padding_change_nothing_and_stay_finite(kind, dtype, around):
    skip_where_there_are_no_panels(kind, dtype)
    rng = np.random.default_rng(3)
    x, residual = (jnp.asarray(rng.standard_normal((40, size)), jnp.float32) for size in (96, 2 * 83))
    weight, norm = jnp.asarray(rng.standard_normal((2, 83, 96)), dtype), jnp.ones(96, dtype)

    def product(num_tokens):
        y = product_of(kind, around, x, weight, norm, residual, jnp.dtype(dtype), num_tokens)
        return np.asarray(y.astype(jnp.float32))

    whole = product(None)
    for count in (0, 1, 15, 33, 40):
        y = product(jnp.int32(count))
        np.testing.assert_array_equal(y[:count], whole[:count])
        assert np.isfinite(y[count:]).all()
        if kind != "xla" and "residual" not in around:  # they were left out
            np.testing.assert_array_equal(y[count:], 0)


@pytest.mark.parametrize(("num_rows", "depth"), [(7, 6), (64, 10), (83, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_found_in_panels(dtype, num_rows, depth):
    weight = jnp.asarray(np.random.default_rng(4).standard_normal((num_rows, depth)), dtype)
    panels = jnp.asarray(to_panels(np.asarray(weight), 32))
    rows = jnp.asarray([num_rows - 1, 0, 5, 5, num_rows // 2])
    np.testing.assert_array_equal(np.asarray(panel_rows(panels, rows, 32)), np.asarray(weight[rows]))


@pytest.mark.parametrize("case", [case for case in CASES if case.in_features % 2 == 0], ids=lambda case: case.name)
def test_weights_in_panels_agree_with_the_reference(case):
    skip_where_there_are_no_panels("panels", case.dtype)
    x, weight = make_inputs(case)
    y = matmul(
        x,
        jnp.asarray(to_panels(np.asarray(weight), native.panel_columns(weight.dtype))),
        out_dtype=jnp.float32,
        implementation="native_cpu",
        panels=True,
    )
    rounded = np.asarray(x.astype(weight.dtype).astype(jnp.float32))
    expected = matmul_reference(rounded, np.asarray(weight.astype(jnp.float32)))
    np.testing.assert_allclose(np.asarray(y), expected, rtol=1e-5, atol=1e-6 * case.in_features)


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
    with pytest.raises(ValueError, match="residual must be"):
        matmul(x, weight, out_dtype=jnp.float32, implementation="xla", residual=jnp.ones((4, 15)))
    with pytest.raises(ValueError, match="norm must be"):
        matmul(x, weight, out_dtype=jnp.float32, implementation="native_cpu", norm=jnp.ones(16))
    with pytest.raises(ValueError, match="num_tokens must be int32"):
        matmul(x, weight, out_dtype=jnp.float32, implementation="xla", num_tokens=jnp.float32(3))
    with pytest.raises(ValueError, match="panels are for 'native_cpu' alone"):
        matmul(x, weight, out_dtype=jnp.float32, implementation="xla", panels=True)
    with pytest.raises(NotImplementedError, match="no weights of float16 in panels"):
        matmul(x, weight.astype(jnp.float16), out_dtype=jnp.float32, implementation="native_cpu", panels=True)
