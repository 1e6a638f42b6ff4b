"""Rotary position embedding in plain JAX, as the fused kernels must compute it."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "tokens *heads head_dim"],
    cos: Float[Array, "tokens {x.shape[-1]//2}"],
    sin: Float[Array, "tokens {x.shape[-1]//2}"],
) -> Float[Array, "tokens *heads head_dim"]:
    """Rotates each pair (x[i], x[i + head_dim / 2]) by its position's angle, in float32; x's shape and dtype."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1] // 2)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
