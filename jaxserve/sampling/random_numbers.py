"""Random numbers that are a function of a seed and a counter: Threefry-2x32, twenty rounds.

Our own lines, and not `jax.random`, so that an answer can be replayed under any version and setting of JAX; they also
compile in a fifth of the time.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
ONE_BELOW = np.float32(1 - 2**-24)  # the largest float32 under 1


def uniforms(
    seed: UInt32[Array, "rows 2"], position: Int[Array, " rows"], attempt: Int[Array, ""] | int
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Two numbers in [0, 1) a row, fresh for each (seed, position, attempt).

    Near 0 they are 2**-32 apart, near 1 as close as float32 can say.
    """
    counter = (position.astype(jnp.uint32), jnp.full(position.shape, attempt, jnp.uint32))
    first, second = threefry((seed[:, 0], seed[:, 1]), counter)
    return _to_unit(first), _to_unit(second)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Encrypts pairs of 32-bit words (Salmon and others, 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    left, right = counter[0] + key[0], counter[1] + key[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation)))
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return left, right


def _to_unit(words: UInt32[Array, " rows"]) -> Float[Array, " rows"]:
    return jnp.minimum(words.astype(jnp.float32) * np.float32(2**-32), ONE_BELOW)
