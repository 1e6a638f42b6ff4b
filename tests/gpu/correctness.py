"""Every kernel against its oracle on the device; slots that nobody may read hold NaN."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.kv_write import kv_write, rotate_and_write
from pallas_kernels.kv_write.cases import Case as WriteCase
from pallas_kernels.kv_write.reference import kv_write_reference, rotate_and_write_reference
from pallas_kernels.numerics import pool_dtype, tolerance
from pallas_kernels.paged_attention import choose_implementation, paged_attention
from pallas_kernels.paged_attention.cases import Case, Inputs, expected, make_inputs
from tests.gpu.cases import attention_cases, rotation_cases, write_cases
from tests.gpu.sizes import Sizes

_THREADS = 12  # that compile; lowering holds Python's lock, compilers do not
_GROUP = 4  # query heads a KV head, of rotations

Check = Callable[[], dict[str, Any]]


def works(sizes: Sizes) -> list[str]:
    """Kernel and case, `paged_attention/decodes_of_128`; writes first, which everything else depends on."""
    tables = {"kv_write": write_cases, "rotate_and_write": rotation_cases, "paged_attention": attention_cases}
    return [f"{op}/{name}" for op, cases in tables.items() for name in cases(sizes)]


def prepare(sizes: Sizes, names: list[str]) -> Callable[[str], dict[str, Any]]:
    """Starts to compile all of `names` at once; the function waits for a work's program and runs it.

    NotImplementedError, with the reason, for a case that the kernel refuses: none of these is meant to be.
    """
    pool = ThreadPoolExecutor(_THREADS)
    futures: dict[str, Future[Check]] = {name: pool.submit(_compiled, sizes, name) for name in names}

    def run(name: str) -> dict[str, Any]:
        return futures[name].result()()

    return run


def _compiled(sizes: Sizes, name: str) -> Check:
    op, _, case = name.partition("/")
    if op == "paged_attention":
        return _attention(attention_cases(sizes)[case], sizes)
    if op == "kv_write":
        return _write(write_cases(sizes)[case], sizes)
    return _rotation(rotation_cases(sizes)[case], sizes)


def _attention(case: Case, sizes: Sizes) -> Check:
    choose_implementation(sizes.implementation, case.geometry, device=jax.devices()[0])  # raises if it refuses
    inputs = make_inputs(case, implementation=sizes.implementation, unread=np.nan)
    call, operands = attention_call(case, inputs)
    program = call.lower(*operands).compile()

    def check() -> dict[str, Any]:
        got = program(*operands)
        return compared(got, expected(case, inputs), case.dtype)

    return check


def attention_call(case: Case, inputs: Inputs) -> tuple[Any, tuple[Any, ...]]:
    """A case's jitted call and its operands."""

    def call(q: Any, k_pool: Any, v_pool: Any, metadata: Any, sinks: Any) -> jax.Array:
        return paged_attention(q, k_pool, v_pool, metadata, sinks=sinks, **case.options)

    metadata = jax.tree.map(jnp.asarray, inputs.metadata)
    return jax.jit(call), (inputs.q, inputs.k_pool, inputs.v_pool, metadata, inputs.sinks)


def _write(case: WriteCase, sizes: Sizes) -> Check:
    k, v, pools, slots = _write_inputs(case)
    operands = tuple(map(jnp.asarray, (k, v, *_stored(pools), slots)))
    program = jax.jit(partial(kv_write, implementation=sizes.implementation)).lower(*operands).compile()

    def check() -> dict[str, Any]:
        pairs = zip(program(*operands), kv_write_reference(k, v, *pools, slots), strict=True)
        exact = all(np.array_equal(_logical(got, pools)[1:], wanted[1:]) for got, wanted in pairs)  # bit for bit
        return {"max_error": 0.0 if exact else float("inf"), "of_allowed": 0.0 if exact else float("inf")}

    return check


def _rotation(case: WriteCase, sizes: Sizes) -> Check:
    rng = np.random.default_rng(1)
    _, _, pools, slots = _write_inputs(case)
    qkv = rng.standard_normal((len(slots), case.kv_heads, _GROUP + 2, case.head_dim)).astype(pools.dtype)
    angles = rng.uniform(-np.pi, np.pi, (len(slots), case.head_dim // 2))
    projected = (qkv, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    operands = tuple(map(jnp.asarray, (*projected, *_stored(pools), slots)))
    program = jax.jit(partial(rotate_and_write, implementation=sizes.implementation)).lower(*operands).compile()

    def check() -> dict[str, Any]:
        queries, *written = program(*operands)
        wanted, *right = rotate_and_write_reference(*projected, *pools, slots)
        results = [compared(queries, wanted, case.dtype)]
        for got, pool in zip(written, right, strict=True):
            results.append(compared(_logical(got, pools)[1:], pool[1:], case.dtype))
        return max(results, key=lambda result: result["of_allowed"])

    return check


def _write_inputs(case: WriteCase) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """K and V [tokens, kv_heads, head_dim], both pools, slots."""
    rng = np.random.default_rng(0)
    shape = (case.num_blocks, case.block_size, case.kv_heads, case.head_dim)
    dtype = jnp.dtype(case.dtype)
    pools = rng.standard_normal((2, *shape)).astype(dtype)
    k, v = rng.standard_normal((2, len(case.slots), *shape[2:])).astype(dtype)
    return k, v, pools, np.asarray(case.slots, np.int32)


def _stored(pools: np.ndarray) -> np.ndarray:
    return pools.view(pool_dtype(pools.dtype, jax.default_backend()))


def _logical(pool: jax.Array, pools: np.ndarray) -> np.ndarray:
    return np.asarray(pool).view(pools.dtype)


def compared(got: Any, wanted: np.ndarray, dtype: str) -> dict[str, Any]:
    """The largest error, and the largest share of what is allowed (`numerics.tolerance`): above 1 is wrong."""
    close = tolerance(dtype)
    got, wanted = np.asarray(got).astype(np.float64), np.asarray(wanted, np.float64)
    errors = np.abs(got - wanted)
    shares = errors / (close["atol"] + close["rtol"] * np.abs(wanted))
    is_number = np.isfinite(got).all()
    return {
        "max_error": float(errors.max(initial=0.0)) if is_number else float("inf"),
        "of_allowed": float(shares.max(initial=0.0)) if is_number else float("inf"),
    }
