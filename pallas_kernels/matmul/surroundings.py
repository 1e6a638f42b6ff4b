"""What a model does around a product: a norm before it, a gate and a residual stream behind it, padding below it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """See `matmul`; a gate is told by the weight's shape."""

    norm: jax.Array | None  # [in_features]
    epsilon: float
    residual: jax.Array | None  # [tokens, out_features]
    num_tokens: jax.Array | None  # i32[]; XLA computes padding all the same

    def check(self, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
        """Raises ValueError where shapes do not fit the product's."""
        if self.norm is not None and self.norm.shape != x_shape[1:]:
            raise ValueError(f"norm must be {list(x_shape[1:])}, got {list(self.norm.shape)}")
        if self.residual is not None and self.residual.shape != y_shape:
            raise ValueError(f"residual must be {list(y_shape)}, got {list(self.residual.shape)}")
        if self.num_tokens is not None and (self.num_tokens.shape, self.num_tokens.dtype) != ((), jnp.int32):
            raise ValueError(f"num_tokens must be int32[], got {self.num_tokens.dtype}{list(self.num_tokens.shape)}")

    def surround(
        self,
        product: Callable[[jax.Array, jax.Array], jax.Array],
        x: jax.Array,  # [tokens, in_features]
        weight: jax.Array,  # [out_features, in_features] or [2, out_features, in_features]
    ) -> jax.Array:
        """`product(x, weight [.., in_features])` with all this as operations of XLA's."""
        if self.norm is not None:
            x = rms_norm(x, self.norm, self.epsilon)
        y = product(x.astype(weight.dtype), weight.reshape(-1, weight.shape[-1]))
        if weight.ndim == 3:
            gate, up = y[:, : weight.shape[1]], y[:, weight.shape[1] :]
            y = jax.nn.silu(gate) * up
        return y if self.residual is None else self.residual + y
