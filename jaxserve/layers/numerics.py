"""Which dtypes a model computes in; every layer is built with one `Numerics`."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Dtypes of weights and of what flows between layers.

    Matrix products read both operands as `weights` and accumulate in float32. XLA:CPU has a fast bfloat16 product
    only where the result is float32 (2 ms against 30 ms for [16, 576] x [49152, 576]), and slow bfloat16 element-wise
    code, so there `activations` is float32; GPUs and TPUs halve their traffic with `activations` = `weights`.

    XLA:CPU repacks the right-hand side of a float32 product at every call. With few tokens the weight is far the
    larger operand, and belongs on the left: 2 to 16 tokens take 0.6 of the time so, 64 tokens 0.95, 512 tokens 1.3.
    """

    weights: DTypeLike = jnp.float32
    activations: DTypeLike = jnp.float32
    max_weight_first: int = 0  # products of 2 to this many tokens have the weight on the left

    @classmethod
    def for_platform(cls, platform: str, weights: DTypeLike) -> Numerics:
        """The dtypes for "cpu", "gpu" or "tpu"."""
        if platform != "cpu":
            return cls(weights=weights, activations=weights)
        return cls(weights=weights, activations=jnp.float32, max_weight_first=64 if weights == jnp.float32 else 0)
