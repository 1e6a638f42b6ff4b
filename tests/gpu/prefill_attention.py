"""Causal attention of whole prompts beside a matrix product of the same device, and beside cuDNN's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import Timing, product_rate, time_calls
from pallas_kernels.paged_attention.runs import AttentionRun
from tests.gpu.attention_programs import CHAINS_AT_ONCE, prefill_run
from tests.gpu.sizes import Sizes


def works(sizes: Sizes) -> list[str]:
    """The product; each length of prompt; cuDNN on the same."""
    return ["product", *(f"{kind}/{prompt}" for kind in ("prompts", "cudnn") for prompt in sizes.prompts)]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Compiles all lengths at once, before anything is timed."""
    pool = ThreadPoolExecutor(len(sizes.prompts))
    runs = {name: prefill_run(sizes, int(name.partition("/")[2])) for name in names if name.startswith("prompts/")}
    futures = {name: pool.submit(_compiled, run) for name, run in runs.items()}
    wait(futures.values())

    def measure(name: str) -> dict[str, Any]:
        if name == "product":
            return {"flops_per_s": product_rate(sizes.product_size)}
        if name in runs:
            run, program = runs[name], futures[name].result()
            operands = (*run.operands(), jax.tree.map(jnp.asarray, run.batches()))
            return _figures(run, time_calls(lambda: program(*operands), pieces=run.length, at_once=CHAINS_AT_ONCE))
        return _cudnn(prefill_run(sizes, int(name.partition("/")[2])), "cudnn" if sizes.device == "cuda" else "xla")

    return measure


def _compiled(run: AttentionRun) -> Any:
    return run.chain(run.length).lower(run.queries, run.pool, run.pool, run.batches()).compile()


def _figures(run: AttentionRun, timing: Timing) -> dict[str, Any]:
    return {
        "prompt": run.query_len,
        "rows": run.rows,
        "us": timing.median_s * 1e6,
        "min_us": timing.min_s * 1e6,
        "flops_per_s": run.flops / timing.median_s,
    }


def _cudnn(run: AttentionRun, implementation: Literal["cudnn", "xla"]) -> dict[str, Any]:
    geometry = run.geometry
    q, k, v = (
        jax.random.normal(key, (run.rows, run.query_len, heads, geometry.head_dim), geometry.dtype)
        for key, heads in zip(
            jax.random.split(jax.random.key(0), 3), (geometry.q_heads, *[geometry.kv_heads] * 2), strict=True
        )
    )
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    def chain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for _ in range(run.length):
            q = attend(q, k, v)
        return q

    program = jax.jit(chain)
    return _figures(run, time_calls(lambda: program(q, k, v), pieces=run.length, at_once=CHAINS_AT_ONCE))
