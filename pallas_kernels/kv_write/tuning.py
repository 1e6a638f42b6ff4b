"""What kv_write offers to autotune: tiles of the GPU's kernel, by the bytes of a token's K."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark import time_calls
from pallas_kernels.compat import gpu_interpret_params
from pallas_kernels.kv_write.mosaic_gpu import kv_write_mosaic_gpu
from pallas_kernels.kv_write.reference import kv_write_reference
from pallas_kernels.kv_write.tiles import checked_write_tiles, heuristic_write_tiles, tuned_sizes
from pallas_kernels.tunable import Problem, WrongResultError, candidates

_HEADS = {"llama_8b": (8, 128), "llama_70b_on_8": (1, 128), "llama_1b": (8, 64), "multi_head": (32, 128)}
_BATCHES = (1, 256, 8192)  # tokens
_AT_ONCE = 20  # calls: a write takes microseconds
_BLOCK_SIZE = 16


def problems(op: str, *, toy: bool) -> list[Problem]:
    """One a model; a toy is interpreted on a CPU."""
    shapes = {"toy": (2, 64)} if toy else _HEADS
    return [_problem(name, kv_heads, head_dim, toy=toy) for name, (kv_heads, head_dim) in shapes.items()]


def _problem(name: str, kv_heads: int, head_dim: int, *, toy: bool) -> Problem:
    row_bytes = 2 * kv_heads * head_dim
    return Problem(
        name=name,
        sizes=tuned_sizes(row_bytes),
        candidates=candidates(
            {"tokens": heuristic_write_tiles(row_bytes).tokens},
            partial(checked_write_tiles, row_bytes),
            {"tokens": (8, 16) if toy else (1, 2, 4, 8, 16, 32, 64)},
        ),
        measure=partial(_measure, kv_heads, head_dim, toy=toy),
    )


def _measure(kv_heads: int, head_dim: int, fields: Mapping[str, int], *, toy: bool) -> dict[str, float]:
    tiles = checked_write_tiles(2 * kv_heads * head_dim, **fields)
    interpret = gpu_interpret_params() if toy else False
    write = jax.jit(partial(kv_write_mosaic_gpu, tiles=tiles, interpret=interpret), donate_argnums=(2, 3))
    us = {}
    for tokens in (16,) if toy else _BATCHES:
        k, v, (k_pool, v_pool), slots = _inputs(tokens, kv_heads, head_dim)
        written = write(k, v, jnp.asarray(k_pool), jnp.asarray(v_pool), slots)
        for got, wanted in zip(written, kv_write_reference(k, v, k_pool, v_pool, slots), strict=True):
            if not np.array_equal(np.asarray(got)[1:], wanted[1:]):
                raise WrongResultError(f"{tokens} tokens: not every slot holds what was written")
        state = list(written)
        on_device = [jnp.asarray(x) for x in (k, v, slots)]

        def call(operands: list[Any] = on_device, state: list[Any] = state) -> Any:
            state[:] = write(*operands[:2], *state, operands[2])
            return state

        timing = time_calls(call, at_once=1 if toy else _AT_ONCE, repeats=2 if toy else 15)
        us[f"{tokens} tokens"] = timing.median_s * 1e6
    return us


def _inputs(tokens: int, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    num_blocks = 2 + 2 * tokens // _BLOCK_SIZE
    pools = rng.standard_normal((2, num_blocks, _BLOCK_SIZE, kv_heads, head_dim), np.float32).astype(jnp.bfloat16)
    k, v = rng.standard_normal((2, tokens, kv_heads, head_dim), np.float32).astype(jnp.bfloat16)
    slots = _BLOCK_SIZE + rng.permutation((num_blocks - 1) * _BLOCK_SIZE)[:tokens]
    return k, v, pools, slots.astype(np.int32)
