"""Times programs on the device at hand, launches apart from work, and measures what the device can do at most."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

_WARM_UPS = 3  # the first call tries products out, XLA records a CUDA graph in the second and replays it from the third
_COPY_BYTES = 1 << 30
_PRODUCT_SIZE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one piece of work."""

    median_s: float
    min_s: float


def time_calls(run: Callable[[], Any], *, pieces: int = 1, at_once: int = 1, repeats: int = 15) -> Timing:
    """Times `run`, which does `pieces` equal pieces of work one after another, in `repeats` samples.

    A sample dispatches `at_once` calls and waits for the last: with one, the launch and the wait are part of the time;
    with several, the device is busy while the host launches the next.
    """
    for _ in range(_WARM_UPS):
        jax.block_until_ready(run())
    samples = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        for _ in range(at_once - 1):
            run()
        jax.block_until_ready(run())
        samples.append((time.perf_counter() - begin_s) / (at_once * pieces))
    return Timing(median_s=statistics.median(samples), min_s=min(samples))


def copy_rate(num_bytes: int = _COPY_BYTES) -> float:
    """Bytes a second, read and written together, of the faster of a copy and an addition to a large array."""
    x = jnp.ones(num_bytes // 4, jnp.uint32)
    programs = (jax.jit(jnp.copy), jax.jit(lambda x: x + 1))
    fastest_s = min(time_calls(lambda program=program: program(x), at_once=4).min_s for program in programs)
    return 2 * x.nbytes / fastest_s


def product_rate(size: int = _PRODUCT_SIZE) -> float:
    """Operations a second of a bfloat16 product of two square matrices of random values."""
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / time_calls(lambda: product(a, b), at_once=4).min_s
