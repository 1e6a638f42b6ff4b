"""kv_write in numpy, one token at a time."""

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
