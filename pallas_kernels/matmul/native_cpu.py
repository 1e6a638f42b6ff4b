"""matmul on CPUs, in C++ where it beats XLA (pallas_kernels/native/src/matmul.cc)."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.matmul.surroundings import Surroundings
from pallas_kernels.matmul.xla import matmul_xla_cpu

# Of dot products; with more, XLA repacks the weights for many uses, and is as fast or faster. Tiles have no limit.
MAX_TOKENS = 64


def matmul_native_cpu(
    x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings
) -> jax.Array:
    """[tokens, out_features] in out_dtype; a row's result does not depend on the other rows."""
    if weight.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"weights are float32 or bfloat16, not {weight.dtype}")
    on_tiles = weight.dtype == jnp.bfloat16 and native.has_tiles()
    if x.shape[0] > MAX_TOKENS and not on_tiles:
        return matmul_xla_cpu(x, weight, jnp.float32, around).astype(out_dtype)
    return _call(x, weight, out_dtype, around, panels=False)


def matmul_panels(x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings) -> jax.Array:
    """The same with a weight in panels, of any number of tokens."""
    if not native.panel_columns(weight.dtype):
        raise NotImplementedError(f"this processor takes no weights of {weight.dtype} in panels")
    return _call(x, weight, out_dtype, around, panels=True)


def _call(
    x: jax.Array, weight: jax.Array, out_dtype: jax.typing.DTypeLike, around: Surroundings, *, panels: bool
) -> jax.Array:
    nothing = jnp.zeros(0, jnp.float32)
    residual = nothing if around.residual is None else around.residual.astype(jnp.float32)
    narrow = weight.dtype == jnp.bfloat16
    takes_x = narrow and around.norm is None and x.dtype == jnp.bfloat16
    gives_y = narrow and around.residual is None and out_dtype == jnp.bfloat16
    num_tokens = jnp.asarray(x.shape[0], jnp.int32) if around.num_tokens is None else around.num_tokens
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-2]), jnp.bfloat16 if gives_y else jnp.float32)
    y = native.call(
        "matmul",
        result,
        x if takes_x else x.astype(jnp.float32),
        weight,
        nothing if around.norm is None else around.norm,
        residual,
        num_tokens,
        aliases=None if around.residual is None else {3: 0},
        epsilon=np.float32(around.epsilon),
        panels=panels,
    )
    return y.astype(out_dtype)
