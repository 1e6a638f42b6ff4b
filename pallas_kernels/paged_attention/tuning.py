"""What paged attention offers to autotune: tiles of the GPU's two kernels, and of the TPU's one in both its uses."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark import time_calls
from pallas_kernels.compat import gpu_interpret_params
from pallas_kernels.numerics import from_storage, tolerance
from pallas_kernels.paged_attention.cases import Case, make_inputs
from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.implementations import implementation_of
from pallas_kernels.paged_attention.mosaic_gpu import tiles as gpu
from pallas_kernels.paged_attention.mosaic_tpu import tiles as tpu
from pallas_kernels.paged_attention.mosaic_tpu.layout import keys_to_lanes
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.runs import COLD_BYTES, AttentionRun, planned
from pallas_kernels.tunable import Problem, WrongResultError, candidates

_LLAMA = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")
_GPU_MODELS = {  # shared memory leaves heads of 256 no choice
    "llama_8b": _LLAMA,
    "llama_8b_blocks_of_64": dataclasses.replace(_LLAMA, block_size=64),
    "llama_70b_on_8": dataclasses.replace(_LLAMA, q_heads=8, kv_heads=1),
    "llama_1b": dataclasses.replace(_LLAMA, head_dim=64),
    "multi_head": dataclasses.replace(_LLAMA, kv_heads=32),
}
_TPU_MODELS = {
    "llama_8b": dataclasses.replace(_LLAMA, block_size=128),
    "llama_8b_on_4": dataclasses.replace(_LLAMA, q_heads=8, kv_heads=2, block_size=128),
    "llama_70b_on_8": dataclasses.replace(_LLAMA, q_heads=8, kv_heads=1, block_size=128),
}
_TOY = dataclasses.replace(_LLAMA, q_heads=4, kv_heads=1, head_dim=64)

# What is timed: rows, new tokens, tokens of the sequence.
_DECODES = ((1, 1, 1024), (32, 1, 1024), (256, 1, 1024), (32, 1, 8192))
_PREFILLS = ((8, 1024, 1024), (1, 8192, 8192), (1, 2048, 8192))

_GPU_DECODE_AXES = {"kv_tile": (64, 128), "stages": (2, 3, 4, 5, 6, 8, 10), "query_stages": (1, 2)}
_GPU_PREFILL_AXES = {"block_kv": (64, 128, 192, 256), "stages": (2, 3, 4)}
_TPU_KEYS = {"kv_tile": (256, 512, 1024, 2048, 4096), "kv_chunk": (128, 256, 512, 1024)}

# What is held against the oracle first: a token, tiles of keys and one more, rows long enough to be split.
_CHECKED = {
    "decode": ((0, 1), (63, 1), (128, 1), (300, 1)),
    "prefill": ((0, 70), (100, 64), (0, 17), (200, 30)),
}
_TOY_CHECKED = {"decode": ((0, 1), (20, 1)), "prefill": ((5, 20),)}


def problems(op: str, *, toy: bool) -> list[Problem]:
    """One a model; a toy is interpreted on a CPU, with two candidates."""
    family, use = op.split("_")
    models = {"toy": _TOY} if toy else _GPU_MODELS if family == "paged" else _TPU_MODELS
    make = _gpu_problem if family == "paged" else _tpu_problem
    return [make(name, use, geometry, toy) for name, geometry in models.items()]


def _gpu_problem(name: str, use: str, geometry: AttentionGeometry, toy: bool) -> Problem:
    heuristic = gpu.GpuTiles(
        decode=gpu.heuristic_decode_tiles(geometry.head_dim), prefill=gpu.heuristic_prefill_tiles(geometry.head_dim)
    )
    check = partial(gpu.checked_decode_tiles if use == "decode" else gpu.checked_prefill_tiles, geometry)
    axes = _GPU_DECODE_AXES if use == "decode" else _GPU_PREFILL_AXES
    return _problem(name, use, geometry, heuristic, check, axes, gpu.tuned_sizes(geometry), toy)


def _tpu_problem(name: str, use: str, geometry: AttentionGeometry, toy: bool) -> Problem:
    heuristic = tpu.TpuTiles(decode=tpu.heuristic_decode_tiles(geometry), prefill=tpu.heuristic_prefill_tiles(geometry))
    check = partial(tpu.checked_tiles, geometry, is_decode=use == "decode")
    axes = {"query_tile": (1,) if use == "decode" else (16, 32, 64, 128), **_TPU_KEYS}
    return _problem(name, use, geometry, heuristic, check, axes, tpu.tuned_sizes(geometry), toy)


def _problem(
    name: str,
    use: str,
    geometry: AttentionGeometry,
    heuristic: Any,
    check: Callable[..., Any],
    axes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int | str],
    toy: bool,
) -> Problem:
    found = candidates(dataclasses.asdict(getattr(heuristic, use)), check, axes)

    def measure(fields: Mapping[str, int]) -> dict[str, float]:
        tiles = dataclasses.replace(heuristic, **{use: check(**fields)})
        implementation = "mosaic_gpu" if isinstance(heuristic, gpu.GpuTiles) else "mosaic_tpu"
        return _measure(_Candidate(implementation=implementation, use=use, geometry=geometry, tiles=tiles, toy=toy))

    return Problem(name=name, sizes=sizes, candidates=found[:2] if toy else found, measure=measure)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """Tiles for a geometry, all that measuring needs to know."""

    implementation: Any
    use: str
    geometry: AttentionGeometry
    tiles: Any
    toy: bool

    @property
    def toy_tokens(self) -> int:
        """Of a toy's step: in one of fewer a GPU has no prefill kernel."""
        return 72 if self.implementation == "mosaic_gpu" else 32

    @property
    def interpreter(self) -> dict[str, Any]:
        """A toy's kernel runs on the CPU, in the interpreter of its device."""
        if not self.toy:
            return {}
        return {"interpret": gpu_interpret_params() if self.implementation == "mosaic_gpu" else True}

    def attend(self, q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, metadata: Any, *, scale: float) -> jax.Array:
        """The kernel itself; CPUs store bfloat16 as bits."""
        run = implementation_of(self.implementation).paged_attention
        return run(q, from_storage(k_pool), from_storage(v_pool), metadata, scale=scale, **self.interpreter)


def _measure(candidate: _Candidate) -> dict[str, float]:
    """Microseconds of a call by batch, after a look at its values; WrongResultError if they are wrong."""
    _check_values(candidate)
    toys = {"decode": ((2, 1, 80),), "prefill": ((1, candidate.toy_tokens, candidate.toy_tokens),)}
    batches = toys if candidate.toy else {"decode": _DECODES, "prefill": _PREFILLS}
    us = {}
    for rows, query_len, kv_len in batches[candidate.use]:
        run = AttentionRun(
            geometry=candidate.geometry,
            implementation=candidate.implementation,
            rows=rows,
            query_len=query_len,
            kv_len=kv_len,
            has_prefill=candidate.use == "prefill",
            cold_bytes=1 if candidate.toy else COLD_BYTES,
        )
        length = 1 if candidate.toy else run.length
        operands = (*run.operands(), jax.tree.map(jnp.asarray, run.batches(candidate.tiles)))
        program = run.chain(length, candidate.attend)
        timing = time_calls(partial(program, *operands), pieces=length, repeats=2 if candidate.toy else 15)
        us[f"{rows} x {query_len} at {kv_len}"] = timing.median_s * 1e6
    return us


def _check_values(candidate: _Candidate) -> None:
    geometry, rows = candidate.geometry, (_TOY_CHECKED if candidate.toy else _CHECKED)[candidate.use]
    case = Case(
        name="tuning",
        rows=rows,
        q_heads=geometry.q_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        block_size=geometry.block_size,
        dtype=geometry.dtype,
        num_tokens=candidate.toy_tokens if candidate.toy else 192,
        has_prefill=candidate.use == "prefill",
    )
    inputs = make_inputs(case, implementation=candidate.implementation, unread=np.nan)
    metadata = planned(
        np.asarray(case.query_lens, np.int32),
        np.asarray(case.kv_lens, np.int32),
        inputs.block_tables,
        implementation=candidate.implementation,
        tiles=candidate.tiles,
        geometry=geometry,
        num_tokens=case.num_tokens,
        num_rows=case.num_rows,
        has_prefill=case.has_prefill,
    )
    scale = geometry.head_dim**-0.5
    pools = [_laid_out(pool, candidate) for pool in (inputs.k_pool, inputs.v_pool)]
    got = jax.jit(partial(candidate.attend, scale=scale))(inputs.q, *pools, jax.tree.map(jnp.asarray, metadata))
    q = np.asarray(inputs.q.astype(jnp.float32))
    values = inputs.k_values, inputs.v_values
    wanted = paged_attention_reference(q, *values, case.query_lens, case.kv_lens, inputs.block_tables, scale=scale)
    close = tolerance(geometry.dtype)
    errors = np.abs(np.asarray(got.astype(jnp.float32)) - wanted)
    if not (errors <= close["atol"] + close["rtol"] * np.abs(wanted)).all():  # nan is wrong too
        raise WrongResultError(f"off by up to {errors.max():.3g}, {close} is allowed")


def _laid_out(pool: jax.Array, candidate: _Candidate) -> jax.Array:
    """[num_blocks, block_size, kv_heads, head_dim], as the implementation has it."""
    if candidate.implementation != "mosaic_tpu":
        return pool
    num_blocks, block_size, kv_heads, head_dim = pool.shape
    lanes = tpu.layout_of(candidate.geometry).lanes
    rows = keys_to_lanes(from_storage(pool).reshape(-1, kv_heads, head_dim), lanes)
    return rows.reshape(num_blocks, block_size, lanes)
