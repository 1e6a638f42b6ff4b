"""Contract of matmul: `x @ weight.T`, with weights as checkpoints have them."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax

from pallas_kernels.matmul.native_cpu import matmul_native_cpu
from pallas_kernels.matmul.xla import matmul_xla, matmul_xla_cpu

MatmulImplementation = Literal["native_cpu", "xla_cpu", "xla"]

_KERNELS: Mapping[MatmulImplementation, Callable[[jax.Array, jax.Array, jax.typing.DTypeLike], jax.Array]] = {
    "native_cpu": matmul_native_cpu,
    "xla_cpu": matmul_xla_cpu,
    "xla": matmul_xla,
}


@functools.partial(jax.jit, static_argnames=("implementation", "out_dtype"), inline=True)
def matmul(
    x: jax.Array,  # [tokens, in_features]
    weight: jax.Array,  # [out_features, in_features]
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: MatmulImplementation,
) -> jax.Array:
    """Returns [tokens, out_features] in `out_dtype`: x is rounded to the weight's dtype, sums are float32.

    "xla" runs anywhere; "xla_cpu" does too, and is shaped for what XLA:CPU does well. "native_cpu" wants float32 or
    bfloat16 weights, `native.load()` to work on this machine, and both operands whole on one device.
    """
    if implementation not in _KERNELS:
        raise ValueError(f"matmul: unknown implementation {implementation!r}; use one of {sorted(_KERNELS)}")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must be [tokens, in_features] and [out_features, in_features], got {x.shape} and "
            f"{weight.shape}"
        )
    return _KERNELS[implementation](x.astype(weight.dtype), weight, out_dtype)
