"""kv_write as one scatter a pool: O(tokens) work, in place under donation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.numerics import to_storage


def kv_write_xla(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    k_pool: Shaped[Array, "num_blocks block_size kv_heads head_dim"],
    v_pool: Shaped[Array, "num_blocks block_size kv_heads head_dim"],
    slots: Int32[Array, " tokens"],
) -> tuple[
    Shaped[Array, "num_blocks block_size kv_heads head_dim"], Shaped[Array, "num_blocks block_size kv_heads head_dim"]
]:
    """Scatters whole [kv_heads * head_dim] rows: a slot is one contiguous row of the flattened pool."""
    if slots.shape[0] == 1:
        # XLA turns a scatter of one row into a dynamic-update-slice, and then copies the pool for the loops that read
        # it afterwards. The same row twice keeps it a scatter.
        k, v, slots = (jnp.concatenate([x, x]) for x in (k, v, slots))
    return _write(k, k_pool, slots), _write(v, v_pool, slots)


def _write(x: jax.Array, pool: jax.Array, slots: jax.Array) -> jax.Array:
    rows = to_storage(x, pool.dtype).reshape(x.shape[0], -1)
    flat = pool.reshape(-1, rows.shape[1])  # [slots, kv_heads * head_dim]
    flat = flat.at[slots].set(rows, mode="promise_in_bounds", wrap_negative_indices=False)
    return flat.reshape(pool.shape)
