"""What an attention layer looks like to a kernel: the sizes that decide which kernel runs and how it is planned."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGeometry:
    """Sizes of the attention of one model on one device: heads are that device's share."""

    q_heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # of queries and, logically, of the pools: "float32", "bfloat16", "float16"
    sliding_windows: tuple[int | None, ...] = (None,)  # the distinct windows of the layers; None: all of the past

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads, got {self.q_heads} and {self.kv_heads}")

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.q_heads // self.kv_heads


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """i32[length]: `values`, then zeros."""
    filled = np.zeros(length, np.int32)
    filled[: len(values)] = values
    return filled
