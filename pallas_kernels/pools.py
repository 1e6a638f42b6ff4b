"""How the K and V pools of a layer are laid out for each implementation, and the checks that go with it."""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.numerics import POOL_DTYPES, pool_shape


def pool_shape_of(
    implementation: Implementation, *, num_blocks: int, block_size: int, kv_heads: int, head_dim: int
) -> tuple[int, ...]:
    """Shape of one layer's K (or V) pool on one device; POOL_HEAD_AXIS is the axis that a mesh splits.

    >>> pool_shape_of("xla", num_blocks=9, block_size=16, kv_heads=3, head_dim=64)
    (9, 16, 3, 64)
    >>> pool_shape_of("mosaic_tpu", num_blocks=9, block_size=16, kv_heads=3, head_dim=64)
    (9, 16, 256)
    """
    if implementation == "mosaic_tpu":
        from pallas_kernels.paged_attention.mosaic_tpu import layout  # imports Mosaic, which is slow, for TPUs alone

        return layout.pool_shape(num_blocks, block_size, kv_heads, head_dim)
    return pool_shape(num_blocks, block_size, kv_heads, head_dim)


def check_pools(
    k_pool: jax.Array, v_pool: jax.Array, implementation: Implementation, *, kv_heads: int, head_dim: int
) -> None:
    """Raises ValueError unless both pools are alike, of a pool dtype, and laid out for the implementation."""
    if k_pool.shape != v_pool.shape or k_pool.dtype != v_pool.dtype or k_pool.ndim < 2:
        raise ValueError(
            "pools must both be of one shape and one dtype, "
            f"got {k_pool.dtype}{list(k_pool.shape)} and {v_pool.dtype}{list(v_pool.shape)}"
        )
    wanted = pool_shape_of(
        implementation,
        num_blocks=k_pool.shape[0],
        block_size=k_pool.shape[1],
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
    if k_pool.shape != wanted:
        raise ValueError(
            f"pools of {kv_heads} KV heads of {head_dim} are {list(wanted)} for {implementation}, "
            f"got {list(k_pool.shape)}"
        )
    if k_pool.dtype not in POOL_DTYPES:
        names = ", ".join(jnp.dtype(d).name for d in POOL_DTYPES)
        raise ValueError(f"pool dtype {k_pool.dtype} is not supported; use one of {names} (uint16: bfloat16 bits)")
