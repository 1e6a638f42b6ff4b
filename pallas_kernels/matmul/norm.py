"""Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """`x / rms(x) * weight` over the last axis, in x's dtype."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)
