"""Runs cases of paged attention by the kernels of devices that are not there, in their interpreters."""

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.compat import gpu_interpret_params, gpu_interpreter_models_memory
from pallas_kernels.numerics import from_storage
from pallas_kernels.paged_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.paged_attention.cases import Case, Inputs
from pallas_kernels.paged_attention.mosaic_gpu import attention
from pallas_kernels.paged_attention.mosaic_tpu import tiles
from tests.kernels.left_out import Waits


def small_tiles_of_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 keys, chunks of 128, query tiles of 16 to 32 tokens: the loops go round in small cases too."""
    monkeypatch.setattr(tiles, "MAX_KV_TILE", 256)
    monkeypatch.setattr(tiles, "KV_CHUNK", 128)
    monkeypatch.setattr(tiles, "PREFILL_ROWS", 64)


def few_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU, each of which is interpreted."""
    monkeypatch.setattr(attention, "decode_sizes", partial(attention.decode_sizes, num_sms=2))


def gpu() -> object:
    """The interpreter of GPU kernels; where it knows fences, it raises at a race."""
    return gpu_interpret_params(detect_races=gpu_interpreter_models_memory())


def on_gpu(case: Case, inputs: Inputs) -> jax.Array:
    """Attention of inputs that were planned for `mosaic_gpu`."""
    run = partial(mosaic_gpu.paged_attention, **case.options, interpret=gpu())
    pools = from_storage(inputs.k_pool), from_storage(inputs.v_pool)
    return jax.jit(run)(inputs.q, *pools, jax.tree.map(jnp.asarray, inputs.metadata), sinks=inputs.sinks)


def watch_tpu_copies(waits: Waits) -> AbstractContextManager[object]:
    """Has what kernels wait for watched, while they are traced."""
    make = pltpu.make_async_copy

    def make_watched(*refs: Any) -> Any:
        copy = make(*refs)
        copy.wait = waits.watched("wait", copy.wait)
        return copy

    return mock.patch.object(pltpu, "make_async_copy", make_watched)


def on_tpu(case: Case, inputs: Inputs, interpret: object = True) -> jax.Array:
    """Attention of inputs that were planned for `mosaic_tpu`."""
    pools = [in_lanes(values, case.dtype) for values in (inputs.k_values, inputs.v_values)]
    return _on_tpu(inputs.q, *pools, inputs.metadata, inputs.sinks, **case.options, interpret=interpret)


@jax.jit(static_argnames=("scale", "sliding_window", "soft_cap", "interpret"))  # cases of one shape compile once
def _on_tpu(q, k_pool, v_pool, metadata, sinks, **static):
    return mosaic_tpu.paged_attention(q, k_pool, v_pool, metadata, sinks=sinks, **static)


def in_lanes(values: np.ndarray, dtype: str) -> jax.Array:
    """A pool [num_blocks, block_size, kv_heads, head_dim] as the TPU holds it; lanes without a head are zeros."""
    num_blocks, block_size, kv_heads, head_dim = values.shape
    padded = mosaic_tpu.padded_head_dim(head_dim)
    lanes = -(-kv_heads * padded // 128) * 128
    out = np.zeros((num_blocks, block_size, kv_heads, padded))
    out[..., :head_dim] = values
    out = np.pad(out.reshape(num_blocks, block_size, -1), ((0, 0), (0, 0), (0, lanes - kv_heads * padded)))
    return jnp.asarray(out, dtype)
