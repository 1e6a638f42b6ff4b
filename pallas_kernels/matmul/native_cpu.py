"""matmul on CPUs, in C++ where it beats XLA (pallas_kernels/native/src/matmul.cc)."""

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.matmul.xla import matmul_xla_cpu

MAX_TOKENS = 4096  # with more, XLA repacks the weights for many uses, and is as fast or faster


def matmul_native_cpu(x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """[tokens, out_features] in out_dtype; a row's result does not depend on the other rows."""
    if weight.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"weights are float32 or bfloat16, not {weight.dtype}")
    if x.shape[0] > MAX_TOKENS:
        return matmul_xla_cpu(x, weight, out_dtype)
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return native.call("matmul", result, x.astype(jnp.float32), weight).astype(out_dtype)
