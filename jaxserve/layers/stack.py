"""Runs a stack of like layers: unrolled in the program, traced once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.cache.kv_cache import LayerCache


def apply_layers(
    layers: Iterable[nnx.Module], x: Float[Array, "tokens hidden"], caches: Sequence[LayerCache], *shared: Any
) -> tuple[Float[Array, "tokens hidden"], list[LayerCache]]:
    """`x, cache = layer(x, cache, *shared)` for each layer: (the last x, the caches).

    The program holds every layer (a scan over layers copies weights and pools on XLA:CPU, two to three times slower),
    but layers of the same shape are traced and lowered once: 0.06 s instead of 0.5 s for 30 layers, a bucket.
    """
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        graph, state = nnx.split(layer)
        x, cache = _apply(graph, state, x, cache, *shared)
        written.append(cache)
    return x, written


@partial(jax.jit, static_argnums=0)  # inside a jitted step: a cache of the trace, no program of its own
def _apply(
    graph: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    x: Float[Array, "tokens hidden"],
    cache: LayerCache,
    *shared: Any,
) -> tuple[Float[Array, "tokens hidden"], LayerCache]:
    return nnx.merge(graph, state)(x, cache, *shared)
