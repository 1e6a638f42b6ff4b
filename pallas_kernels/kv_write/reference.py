"""kv_write and rotate_and_write in numpy, one token at a time."""

import numpy as np


def kv_write_reference(
    k: np.ndarray,  # [tokens, kv_heads, head_dim]
    v: np.ndarray,
    k_pool: np.ndarray,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: np.ndarray,
    slots: np.ndarray,  # i32[tokens]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns new pools; values are rounded to the pools' dtype."""
    k_pool, v_pool = k_pool.copy(), v_pool.copy()
    block_size = k_pool.shape[1]
    for token, slot in enumerate(slots):
        block, offset = divmod(int(slot), block_size)
        k_pool[block, offset] = k[token]
        v_pool[block, offset] = v[token]
    return k_pool, v_pool


def rotate_and_write_reference(
    qkv: np.ndarray,  # [tokens, kv_heads, group + 2, head_dim]
    cos: np.ndarray,  # f32[tokens, head_dim / 2]
    sin: np.ndarray,
    k_pool: np.ndarray,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: np.ndarray,
    slots: np.ndarray,  # i32[tokens]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rotated queries and new pools. Each pair is a complex number, turned by its token's angle."""
    half = qkv.shape[-1] // 2
    pairs = qkv[:, :, :-1, :half].astype(np.complex64) + 1j * qkv[:, :, :-1, half:].astype(np.complex64)
    turned = pairs * (cos + 1j * sin).astype(np.complex64)[:, None, None, :]
    rotated = np.concatenate([turned.real, turned.imag], axis=-1).astype(qkv.dtype)
    pools = kv_write_reference(rotated[:, :, -1], qkv[:, :, -1], k_pool, v_pool, slots)
    return rotated[:, :, :-1], *pools
