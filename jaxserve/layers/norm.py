"""Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float

from jaxserve.layers.numerics import Numerics
from jaxserve.layers.parameter import parameter
from pallas_kernels.matmul import rms_norm


class RMSNorm(nnx.Module):
    """`x / rms(x) * weight` over the last axis."""

    def __init__(self, size: int, *, epsilon: float, numerics: Numerics) -> None:
        self.weight = parameter((size,), (None,), numerics.weights)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        return rms_norm(x, self.weight[...], self.epsilon)
