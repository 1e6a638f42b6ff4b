"""Paged attention in numpy float64, one query head at a time: the oracle of the tests, written to be read."""

import numpy as np


def paged_attention_reference(
    q: np.ndarray,  # [tokens, q_heads, head_dim]
    k_pool: np.ndarray,  # [num_blocks, block_size, kv_heads, head_dim]
    v_pool: np.ndarray,
    query_lens: list[int],
    kv_lens: list[int],
    block_tables: np.ndarray,  # i32[rows, blocks_per_seq]
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,  # [q_heads]
) -> np.ndarray:
    """Returns float64 [tokens, q_heads, head_dim]; tokens past the last row get zeros."""
    q, k_pool, v_pool = (np.asarray(x, np.float64) for x in (q, k_pool, v_pool))
    block_size, kv_heads = k_pool.shape[1:3]
    group = q.shape[1] // kv_heads
    out = np.zeros(q.shape)
    token = 0
    for row, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        for position in range(kv_len - query_len, kv_len):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            places = [(block_tables[row, p // block_size], p % block_size) for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                keys = np.stack([k_pool[block, offset, head // group] for block, offset in places])
                values = np.stack([v_pool[block, offset, head // group] for block, offset in places])
                sink = None if sinks is None else float(sinks[head])
                out[token, head] = _softmax(_scores(q[token, head], keys, scale, soft_cap), sink) @ values
            token += 1
    return out


def _scores(query: np.ndarray, keys: np.ndarray, scale: float, soft_cap: float | None) -> np.ndarray:
    scores = keys @ query * scale
    return scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)


def _softmax(scores: np.ndarray, sink: float | None) -> np.ndarray:
    """Weights of the scores; with a sink they add up to less than one."""
    top = scores.max() if sink is None else max(scores.max(), sink)
    weights = np.exp(scores - top)
    return weights / (weights.sum() + (0.0 if sink is None else np.exp(sink - top)))
