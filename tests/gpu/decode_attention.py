"""Decode attention beside the rate at which the device copies, and beside cuDNN's on contiguous keys."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark import copy_rate, time_calls
from pallas_kernels.paged_attention.runs import AttentionRun
from tests.gpu.attention_programs import CHAINS_AT_ONCE, decode_run, geometry_of
from tests.gpu.sizes import Sizes

_THREADS = 12


def works(sizes: Sizes) -> list[str]:
    """The copy rate; each batch as a step of decodes and as the engine's steps, which may hold prefills; cuDNN."""
    kinds = ("decodes", "engine", "cudnn")
    return ["copy", *(f"{kind}/{batch}" for kind in kinds for batch in sizes.batches)]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Compiles all batches at once; nothing is timed beside a compiler, which keeps the host busy."""
    pool = ThreadPoolExecutor(_THREADS)
    runs = {name: run for name in names if (run := _run_of(sizes, name)) is not None}
    futures = {name: pool.submit(_compiled, run) for name, run in runs.items()}
    wait(futures.values())

    def measure(name: str) -> dict[str, Any]:
        if name == "copy":
            return {"bytes_per_s": copy_rate(sizes.copy_bytes)}
        if name in runs:
            return _measured(runs[name], futures[name])
        return _cudnn(sizes, int(name.partition("/")[2]))

    return measure


def _run_of(sizes: Sizes, name: str) -> AttentionRun | None:
    kind, _, batch = name.partition("/")
    return decode_run(sizes, int(batch), has_prefill=kind == "engine") if kind in ("decodes", "engine") else None


def _compiled(run: AttentionRun) -> dict[int, Any]:
    """The chain, and a single call."""
    operands = (run.queries, run.pool, run.pool, run.batches())
    return {length: run.chain(length).lower(*operands).compile() for length in (run.length, 1)}


def _measured(run: AttentionRun, compiled: Future[dict[int, Any]]) -> dict[str, Any]:
    programs = compiled.result()
    operands = (*run.operands(), jax.tree.map(jnp.asarray, run.batches()))
    chained, single = (
        time_calls(lambda length=length: programs[length](*operands), pieces=length, at_once=at_once)
        for length, at_once in ((run.length, CHAINS_AT_ONCE), (1, 1))
    )
    return {
        "batch": run.rows,
        "us": chained.median_s * 1e6,
        "min_us": chained.min_s * 1e6,
        "single_us": single.median_s * 1e6,  # one call alone: launch and wait included
        "bytes_per_s": run.io_bytes / chained.median_s,
    }


def _cudnn(sizes: Sizes, batch: int) -> dict[str, Any]:
    """Keys and values of each row side by side, as no server can keep them; as many cold copies as the kernel has."""
    geometry = geometry_of(sizes)
    run = decode_run(sizes, batch, has_prefill=False)
    make = jax.jit(partial(jax.random.normal, dtype=geometry.dtype), static_argnames="shape")
    shape = (batch, sizes.context, geometry.kv_heads, geometry.head_dim)
    keys = jax.random.split(jax.random.key(0), 2 * run.sets + 1)
    q = make(keys[0], shape=(batch, 1, geometry.q_heads, geometry.head_dim))
    pairs = [(make(key, shape=shape), make(value, shape=shape)) for key, value in keys[1:].reshape(run.sets, 2)]
    attend = jax.jit(partial(jax.nn.dot_product_attention, implementation="cudnn" if sizes.device == "cuda" else "xla"))

    def chain(q: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        for index in range(run.length):
            q = attend(q, *pairs[index % run.sets])
        return q

    program = jax.jit(chain)
    timing = time_calls(lambda: program(q, pairs), pieces=run.length, at_once=CHAINS_AT_ONCE)
    return {"batch": batch, "us": timing.median_s * 1e6, "min_us": timing.min_s * 1e6}
