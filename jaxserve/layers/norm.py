"""Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxserve.layers.linear import parameter
from jaxserve.layers.numerics import Numerics


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, size: int, *, epsilon: float, numerics: Numerics) -> None:
        self.weight = parameter((size,), (None,), numerics.weights)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)
