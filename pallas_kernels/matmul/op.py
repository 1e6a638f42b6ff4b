"""Contract of matmul: `x @ weight.T`, with weights as checkpoints have them, and what a model does around it."""

import functools
from collections.abc import Mapping
from typing import Literal, Protocol

import jax

from pallas_kernels.matmul.native_cpu import matmul_native_cpu, matmul_panels
from pallas_kernels.matmul.surroundings import Surroundings
from pallas_kernels.matmul.xla import matmul_xla, matmul_xla_cpu

MatmulImplementation = Literal["native_cpu", "xla_cpu", "xla"]


class _Kernel(Protocol):
    def __call__(
        self, x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings, /
    ) -> jax.Array: ...


_KERNELS: Mapping[MatmulImplementation, _Kernel] = {
    "native_cpu": matmul_native_cpu,
    "xla_cpu": matmul_xla_cpu,
    "xla": matmul_xla,
}


@functools.partial(jax.jit, static_argnames=("implementation", "out_dtype", "epsilon", "panels"), inline=True)
def matmul(
    x: jax.Array,  # [tokens, in_features]
    weight: jax.Array,  # [out_features, in_features], or [2, out_features, in_features]
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: MatmulImplementation,
    norm: jax.Array | None = None,  # [in_features]
    epsilon: float = 0.0,
    residual: jax.Array | None = None,  # [tokens, out_features] in out_dtype
    num_tokens: jax.Array | None = None,  # i32[]
    panels: bool = False,
) -> jax.Array:
    """Returns [tokens, out_features] in `out_dtype`: x is rounded to the weight's dtype, sums are float32.

    With `norm`, x is `x / sqrt(mean(x^2) + epsilon) * norm` first. With a weight of three axes, y is
    `silu(x @ weight[0].T) * (x @ weight[1].T)`. With `residual`, y is added to it.
    Rows of x from `num_tokens` on are padding: "native_cpu" leaves them out, and their rows of y are zeros, or the
    residual's; XLA computes them as any other.

    With `panels`, the weight's values lie as `to_panels(weight, native.panel_columns(weight.dtype))` has them: for
    "native_cpu", where these are not 0.

    "xla" runs anywhere; "xla_cpu" does too, and is shaped for what XLA:CPU does well. "native_cpu" wants float32 or
    bfloat16 weights, `native.load()` to work on this machine, and both operands whole on one device.
    """
    if implementation not in _KERNELS:
        raise ValueError(f"matmul: unknown implementation {implementation!r}; use one of {sorted(_KERNELS)}")
    if (
        x.ndim != 2
        or weight.ndim not in (2, 3)
        or x.shape[1] != weight.shape[-1]
        or weight.shape[:-2] not in ((), (2,))
    ):
        raise ValueError(
            f"x and weight must be [tokens, in_features] and [out_features, in_features] or [2, out_features, "
            f"in_features], got {x.shape} and {weight.shape}"
        )
    if panels and implementation != "native_cpu":
        raise ValueError(f"weights in panels are for 'native_cpu' alone, not {implementation!r}")
    around = Surroundings(norm=norm, epsilon=epsilon, residual=residual, num_tokens=num_tokens)
    around.check(x.shape, (x.shape[0], weight.shape[-2]))
    if panels:
        return matmul_panels(x, weight, out_dtype, around)
    return _KERNELS[implementation](x, weight, out_dtype, around)
