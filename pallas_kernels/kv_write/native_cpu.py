"""rotate_and_write on CPUs, in C++ (pallas_kernels/native/src/kv_write.cc)."""

import jax
import jax.numpy as jnp

from pallas_kernels import native


def rotate_and_write_native_cpu(
    qkv: jax.Array,  # [tokens, kv_heads, group + 2, head_dim]
    cos: jax.Array,  # f32[tokens, head_dim / 2]
    sin: jax.Array,
    k_pool: jax.Array,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: jax.Array,
    slots: jax.Array,  # i32[tokens]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the rotated queries and the pools, written in place: one pass over qkv."""
    if k_pool.dtype == jnp.float16:
        raise NotImplementedError("pools are float32 or bfloat16, not float16")
    tokens, heads, parts, depth = qkv.shape
    results = (
        jax.ShapeDtypeStruct((tokens, heads, parts - 2, depth), jnp.float32),
        jax.ShapeDtypeStruct(k_pool.shape, k_pool.dtype),
        jax.ShapeDtypeStruct(v_pool.shape, v_pool.dtype),
    )
    wide = qkv.astype(jnp.float32)
    q, *pools = native.call("rotate_and_write", results, wide, cos, sin, k_pool, v_pool, slots, aliases={3: 1, 4: 2})
    return q.astype(qkv.dtype), *pools
