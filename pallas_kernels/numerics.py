"""How numbers are stored, masked and compared: pool storage types, the mask value, tolerances of tests."""

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -0.7 * float(np.finfo(np.float32).max)  # -inf would give nan on rows that are masked altogether

POOL_HEAD_AXIS = 2  # of pool_shape: the axis that tensor parallelism splits

# A pool may hold these. uint16 stands for the bits of bfloat16.
POOL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.uint16)


def pool_dtype(dtype: jax.typing.DTypeLike, platform: str) -> np.dtype:
    """The dtype a KV pool of logical `dtype` is stored in on `platform` ("cpu", "gpu", "tpu").

    XLA:CPU widens a bfloat16 scatter to float32 and back, which walks the whole pool for a few written tokens; as
    uint16 bits the scatter stays in place.
    """
    return np.dtype(np.uint16) if platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def pool_shape(num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one layer's K (or V) pool.

    A slot is one contiguous row of all its heads: on CPU a token is then written, and read, by one copy.
    """
    return (num_blocks, block_size, kv_heads, head_dim)


def logical_dtype(pool_dtype: jax.typing.DTypeLike) -> np.dtype:
    """The dtype of the values in a pool: undoes `pool_dtype`."""
    return jnp.dtype(jnp.bfloat16) if jnp.dtype(pool_dtype) == jnp.uint16 else jnp.dtype(pool_dtype)


def to_storage(x: jax.Array, pool_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds values to the pool's logical dtype and gives them the pool's storage dtype."""
    x = x.astype(logical_dtype(pool_dtype))
    return jax.lax.bitcast_convert_type(x, pool_dtype) if x.dtype != pool_dtype else x


def from_storage(x: jax.Array) -> jax.Array:
    """Reads stored values as their logical dtype; same bits, no conversion."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def tolerance(dtype: jax.typing.DTypeLike) -> dict[str, float]:
    """`rtol` and `atol` for np.testing.assert_allclose against a float64 reference on inputs of unit variance."""
    loose = {np.dtype(jnp.bfloat16): 2e-2, np.dtype(np.float16): 2e-3}.get(logical_dtype(dtype), 2e-5)
    return {"rtol": loose, "atol": loose}
