"""matmul as one product of XLA's."""

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.surroundings import Surroundings

_MAX_WEIGHT_FIRST = 64  # tokens


def matmul_xla(x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings) -> jax.Array:
    """[tokens, out_features] in out_dtype."""
    return around.surround(lambda x, weight: _product(x, weight, out_dtype), x, weight)


def matmul_xla_cpu(x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings) -> jax.Array:
    """The same; float32 products of few tokens have the weight on the left.

    XLA:CPU repacks the right-hand side of a float32 product at every call. With few tokens the weight is far the
    larger operand: 2 to 16 tokens take 0.6 of the time so, 64 tokens 0.95, 512 tokens 1.3.
    """
    return around.surround(lambda x, weight: _product_cpu(x, weight, out_dtype), x, weight)


def _product_cpu(x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    if weight.dtype != jnp.float32 or not 2 <= x.shape[0] <= _MAX_WEIGHT_FIRST:
        return _product(x, weight, out_dtype)
    return jax.lax.optimization_barrier(_product(weight, x, out_dtype)).T  # or XLA turns the product around again


def _product(left: jax.Array, right: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32 if out_dtype == jnp.float32 else None,
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
    ).astype(out_dtype)
