"""Contracts of kv_write, which puts each token's key and value into its slot of the pools, and of rotate_and_write."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation
from pallas_kernels.kv_write.rotation import rotate
from pallas_kernels.kv_write.xla import kv_write_xla
from pallas_kernels.pools import check_pools


def _mosaic_gpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.kv_write.mosaic_gpu import kv_write_mosaic_gpu  # half a second, for GPUs alone

    return kv_write_mosaic_gpu(*args)


def _mosaic_tpu(*args: Any) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.kv_write.mosaic_tpu import kv_write_mosaic_tpu  # as slow, for TPUs alone

    return kv_write_mosaic_tpu(*args)


_KERNELS: Mapping[Implementation, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "mosaic_gpu": _mosaic_gpu,
    "mosaic_tpu": _mosaic_tpu,
    "native_cpu": kv_write_xla,  # which is as fast; rotate_and_write is what a step runs
    "xla": kv_write_xla,
}


@functools.partial(jax.jit, static_argnames=("implementation",), inline=True)
def kv_write(
    k: jax.Array,  # [tokens, kv_heads, head_dim]
    v: jax.Array,  # [tokens, kv_heads, head_dim]
    k_pool: jax.Array,  # as pools.pool_shape_of has it
    v_pool: jax.Array,  # as k_pool
    slots: jax.Array,  # i32[tokens], block * block_size + offset; padding tokens point into block 0
    *,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Returns the pools with k and v written at `slots`; in place where the pools are donated.

    Slots other than those of block 0 are distinct. A slot outside the pool writes nothing.
    """
    _check(k, v, k_pool, v_pool, slots, implementation)
    return _KERNELS[implementation](k, v, k_pool, v_pool, slots)


@functools.partial(jax.jit, static_argnames=("implementation",), inline=True)
def rotate_and_write(
    qkv: jax.Array,  # [tokens, kv_heads, group + 2, head_dim]: of each KV head its queries, its key, its value
    cos: jax.Array,  # f32[tokens, head_dim / 2]
    sin: jax.Array,  # f32[tokens, head_dim / 2]
    k_pool: jax.Array,  # as kv_write takes them
    v_pool: jax.Array,
    slots: jax.Array,  # i32[tokens], as kv_write takes them
    *,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the rotated queries [tokens, kv_heads, group, head_dim] and the pools with rotated keys, and values.

    Rotation is that of `rotation.rotate`, in float32. One kernel does it all where there is one that takes the call;
    otherwise XLA rotates, and kv_write writes.
    """
    _check_projections(qkv, cos, sin)
    if implementation == "mosaic_gpu":
        from pallas_kernels.kv_write.mosaic_gpu_rotation import rotate_and_write_mosaic_gpu, takes

        if takes(qkv, k_pool):
            _check(qkv[:, :, -2], qkv[:, :, -1], k_pool, v_pool, slots, implementation)
            return rotate_and_write_mosaic_gpu(qkv, cos, sin, k_pool, v_pool, slots)
    if implementation == "native_cpu":
        from pallas_kernels.kv_write.native_cpu import rotate_and_write_native_cpu  # may compile, for CPUs alone

        _check(qkv[:, :, -2], qkv[:, :, -1], k_pool, v_pool, slots, implementation)
        return rotate_and_write_native_cpu(qkv, cos, sin, k_pool, v_pool, slots)
    rotated = rotate(qkv[:, :, :-1], cos, sin)
    pools = kv_write(rotated[:, :, -1], qkv[:, :, -1], k_pool, v_pool, slots, implementation=implementation)
    return rotated[:, :, :-1], *pools


def _check_projections(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    if qkv.ndim != 4 or qkv.shape[2] < 3 or qkv.shape[3] % 2:
        raise ValueError(f"qkv must be [tokens, kv_heads, group + 2, even head_dim], got {qkv.shape}")
    if cos.shape != (qkv.shape[0], qkv.shape[3] // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be [tokens, head_dim / 2] of qkv {qkv.shape}, got {cos.shape}, {sin.shape}")


def _check(
    k: jax.Array,
    v: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    slots: jax.Array,
    implementation: Implementation,
) -> None:
    if implementation not in _KERNELS:
        raise ValueError(f"kv_write: unknown implementation {implementation!r}; use one of {sorted(_KERNELS)}")
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"k and v must both be [tokens, kv_heads, head_dim], got {k.shape} and {v.shape}")
    check_pools(k_pool, v_pool, implementation, kv_heads=k.shape[1], head_dim=k.shape[2])
    if slots.shape != k.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(f"slots must be i32[{k.shape[0]}], got {slots.dtype}{list(slots.shape)}")
