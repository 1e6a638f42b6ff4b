"""Which dtypes a model computes in; every layer is built with one `Numerics`."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.matmul.op import MatmulImplementation
from pallas_kernels.native import panel_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Dtypes of weights and of what flows between layers.

    Matrix products read both operands as `weights` and accumulate in float32. XLA:CPU has a fast bfloat16 product
    only where the result is float32 (2 ms against 30 ms for [16, 576] x [49152, 576]), and slow bfloat16 element-wise
    code, so there `activations` is float32; GPUs and TPUs halve their traffic with `activations` = `weights`.
    """

    weights: DTypeLike = jnp.float32
    activations: DTypeLike = jnp.float32
    products: MatmulImplementation = "xla"
    gated: DTypeLike = jnp.float32  # of what a gated product gives to the next one, which rounds it in any case
    panel_columns: int = 0  # if not 0, weights of products lie in panels of so many rows, see `to_panels`

    @classmethod
    def for_platform(cls, platform: str, weights: DTypeLike, *, native: bool = False) -> Numerics:
        """The dtypes for "cpu", "gpu" or "tpu"; `native`: whether a CPU runs its products in C++."""
        if platform != "cpu":
            return cls(weights=weights, activations=weights, gated=weights)
        if native:
            return cls(
                weights=weights,
                activations=jnp.float32,
                gated=weights,
                products="native_cpu",
                panel_columns=panel_columns(weights),
            )
        return cls(weights=weights, activations=jnp.float32, products="xla_cpu")

    def takes_panels(self, in_features: int) -> bool:
        """Whether weights of so many features lie in panels."""
        return bool(self.panel_columns) and in_features % 2 == 0
