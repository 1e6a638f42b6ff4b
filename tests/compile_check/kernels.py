"""Every kernel of the house, in the shapes that models and launch files ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Lowered

from jaxserve.parallel.mesh import replicated
from pallas_kernels.dispatch import Implementation
from pallas_kernels.kv_write import kv_write, rotate_and_write
from pallas_kernels.paged_attention import (
    AttentionGeometry,
    choose_implementation,
    metadata_shapes,
    paged_attention,
)
from pallas_kernels.pools import pool_shape_of
from tests.compile_check.jobs import Job, Limits
from tests.compile_check.targets import Device, Target

# Of each block size: primes, so that no other array has the size of a pool, and pools larger than a batch.
_NUM_BLOCKS = {16: 8209, 32: 4099, 64: 2053, 128: 1031, 256: 521}
# Tokens a sequence may have. A TPU's: Llama 3.1's whole context, whose block tables for 256 rows are 1 MiB.
_CONTEXT = {"gpu": 8192, "tpu": 131072}

IMPLEMENTATION: dict[str, Implementation] = {"cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}

LLAMA_8B = AttentionGeometry(q_heads=32, kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a model may ask of its attention beside its sizes."""

    soft_cap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A bucket of steps."""

    name: str
    num_tokens: int
    num_rows: int
    has_prefill: bool


DECODE = Batch(name="decode of 256", num_tokens=256, num_rows=256, has_prefill=False)
MIXED = Batch(name="mixed 2048", num_tokens=2048, num_rows=64, has_prefill=True)
SMALL = Batch(name="mixed 4", num_tokens=4, num_rows=4, has_prefill=True)
MEDIUM = Batch(name="mixed 64", num_tokens=64, num_rows=64, has_prefill=True)
LARGE = Batch(name="mixed 8192", num_tokens=8192, num_rows=256, has_prefill=True)

# What it is, the sizes of one device's share, what the model asks for, and the steps.
_Table = tuple[tuple[str, AttentionGeometry, Options, tuple[Batch, ...]], ...]

_GPU: _Table = (
    ("llama 8B", LLAMA_8B, Options(), (DECODE, MIXED, SMALL, MEDIUM, LARGE)),
    ("llama 8B, blocks of 64", replace(LLAMA_8B, block_size=64), Options(), (DECODE, MIXED)),
    ("llama 8B, float16", replace(LLAMA_8B, dtype="float16"), Options(), (DECODE, MIXED)),
    ("llama 8B, window", replace(LLAMA_8B, sliding_windows=(4096,)), Options(), (DECODE, MIXED)),
    ("llama 8B, cap and sinks", LLAMA_8B, Options(soft_cap=50.0, has_sinks=True), (DECODE, MIXED)),
    ("llama 70B on 4", replace(LLAMA_8B, q_heads=16, kv_heads=2), Options(), (DECODE, MIXED)),
    ("llama 70B on 8", replace(LLAMA_8B, q_heads=8, kv_heads=1), Options(), (DECODE, MIXED)),
    ("llama 1B", replace(LLAMA_8B, head_dim=64), Options(), (DECODE, MIXED)),
    ("SmolLM2 135M", replace(LLAMA_8B, q_heads=9, kv_heads=3, head_dim=64), Options(), (DECODE, MIXED)),
    ("no groups", replace(LLAMA_8B, q_heads=32, kv_heads=32), Options(), (DECODE, MIXED)),
    ("no groups of 80", replace(LLAMA_8B, q_heads=32, kv_heads=32, head_dim=80), Options(), (MIXED,)),
    ("no groups of 96", replace(LLAMA_8B, q_heads=32, kv_heads=32, head_dim=96), Options(), (MIXED,)),
    ("Gemma 2 9B", replace(LLAMA_8B, q_heads=16, head_dim=256, sliding_windows=(4096,)), Options(soft_cap=50.0),
     (MIXED, MEDIUM)),
    ("gpt-oss 20B", replace(LLAMA_8B, q_heads=64, head_dim=64, sliding_windows=(128,)), Options(has_sinks=True),
     (MIXED, MEDIUM)),
    # Groups that no model above has, each with one thing more that none has: a block size, or a small step of a size.
    ("groups of 5, blocks of 32", replace(LLAMA_8B, q_heads=40, block_size=32), Options(), (MIXED,)),
    ("groups of 6, blocks of 128", replace(LLAMA_8B, q_heads=48, block_size=128), Options(), (MIXED,)),
    ("groups of 7, blocks of 256", replace(LLAMA_8B, q_heads=28, kv_heads=4, block_size=256), Options(), (MIXED,)),
    ("groups of 9", replace(LLAMA_8B, q_heads=36, kv_heads=4), Options(), (MIXED,)),
    ("groups of 10 and 80", replace(LLAMA_8B, q_heads=20, kv_heads=2, head_dim=80), Options(), (MEDIUM,)),
    ("groups of 11 and 96", replace(LLAMA_8B, q_heads=22, kv_heads=2, head_dim=96), Options(), (MEDIUM,)),
    ("groups of 12", replace(LLAMA_8B, q_heads=48, kv_heads=4), Options(), (MIXED,)),
    ("groups of 13 and 256, float16, everything",
     replace(LLAMA_8B, q_heads=13, kv_heads=1, head_dim=256, dtype="float16", sliding_windows=(64,)),
     Options(soft_cap=30.0, has_sinks=True), (MEDIUM,)),
    ("groups of 14, window", replace(LLAMA_8B, q_heads=28, kv_heads=2, sliding_windows=(4096,)), Options(), (MEDIUM,)),
    ("groups of 15 and 64", replace(LLAMA_8B, q_heads=15, kv_heads=1, head_dim=64), Options(), (MEDIUM,)),
    ("groups of 16", replace(LLAMA_8B, q_heads=32, kv_heads=2), Options(), (MIXED,)),
)  # fmt: skip
_LLAMA_TPU = replace(LLAMA_8B, block_size=128)
_TPU: _Table = (
    ("llama 8B", _LLAMA_TPU, Options(), (DECODE, MIXED, SMALL)),
    ("llama 8B on 4", replace(_LLAMA_TPU, q_heads=8, kv_heads=2), Options(), (DECODE, MIXED)),
    ("llama 8B on 4, cap and sinks", replace(_LLAMA_TPU, q_heads=8, kv_heads=2),
     Options(soft_cap=50.0, has_sinks=True), (DECODE, MIXED)),
    ("llama 8B on 4, window", replace(_LLAMA_TPU, q_heads=8, kv_heads=2, sliding_windows=(4096,)), Options(),
     (DECODE, MIXED)),
    ("llama 70B on 8", replace(_LLAMA_TPU, q_heads=8, kv_heads=1), Options(), (DECODE, MIXED)),
    ("SmolLM2 135M", replace(_LLAMA_TPU, q_heads=9, kv_heads=3, head_dim=64), Options(), (DECODE, MIXED)),
    ("no groups of 80", replace(_LLAMA_TPU, q_heads=32, kv_heads=32, head_dim=80), Options(), (DECODE, MIXED)),
    ("llama 8B on 4, float32", replace(_LLAMA_TPU, q_heads=8, kv_heads=2, dtype="float32"), Options(), (MIXED,)),
)  # fmt: skip


_ROTATED = (
    ("llama 8B", LLAMA_8B),
    ("llama 70B on 8", replace(LLAMA_8B, q_heads=8, kv_heads=1)),
    ("SmolLM2 135M", replace(LLAMA_8B, q_heads=9, kv_heads=3, head_dim=64)),
    ("no groups, float16", replace(LLAMA_8B, q_heads=32, kv_heads=32, dtype="float16")),
    ("no groups of 96", replace(LLAMA_8B, q_heads=32, kv_heads=32, head_dim=96)),
    ("groups of 16 and 256", replace(LLAMA_8B, q_heads=16, kv_heads=1, head_dim=256)),
)


def kernel_jobs() -> list[Job]:
    """Attention with its KV write, on one device of each kind; on GPUs the write alone as well.

    A TPU's write constrains the memory of its pools, which XLA (libtpu 0.0.42) only compiles with a reader after it.
    """
    jobs = []
    tables: dict[Device, _Table] = {"h100": _GPU, "v5e": _TPU, "v6e": _TPU}
    for device, table in tables.items():
        target = Target(device=device, num_devices=1)
        for name, geometry, options, batches in table:
            for batch in batches:
                jobs.append(_attention_job(target, f"attention, {name}, {batch.name}", geometry, options, batch))
        if target.platform == "cuda":
            jobs += [_kv_write_job(target, num_tokens) for num_tokens in (1, 256, 8192)]
    jobs += [_rotation_job(name, geometry, num_tokens) for name, geometry in _ROTATED for num_tokens in (1, 256)]
    return jobs


def _attention_job(target: Target, name: str, geometry: AttentionGeometry, options: Options, batch: Batch) -> Job:
    return Job(
        name=name,
        target=target,
        lower=partial(_lower_attention, IMPLEMENTATION[target.platform], geometry, options, batch),
        limits=_pool_limits(geometry, IMPLEMENTATION[target.platform]),
    )


def _kv_write_job(target: Target, num_tokens: int) -> Job:
    return Job(
        name=f"kv_write, llama 8B, {num_tokens} tokens",
        target=target,
        lower=partial(_lower_kv_write, IMPLEMENTATION[target.platform], LLAMA_8B, num_tokens),
        limits=_pool_limits(LLAMA_8B, IMPLEMENTATION[target.platform]),
    )


def _rotation_job(name: str, geometry: AttentionGeometry, num_tokens: int) -> Job:
    return Job(
        name=f"rotate_and_write, {name}, {num_tokens} tokens",
        target=Target(device="h100", num_devices=1),
        lower=partial(_lower_rotation, geometry, num_tokens),
        limits=_pool_limits(geometry, "mosaic_gpu"),
    )


def _pool_shape(geometry: AttentionGeometry, implementation: Implementation) -> tuple[int, ...]:
    return pool_shape_of(
        implementation,
        num_blocks=_NUM_BLOCKS[geometry.block_size],
        block_size=geometry.block_size,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
    )


def _pool_limits(geometry: AttentionGeometry, implementation: Implementation) -> Limits:
    elements = math.prod(_pool_shape(geometry, implementation))
    pool_bytes = elements * jnp.dtype(geometry.dtype).itemsize
    return Limits(pool_elements=elements, min_alias_bytes=2 * pool_bytes, max_temp_bytes=pool_bytes)


def _pool(geometry: AttentionGeometry, implementation: Implementation, mesh: Mesh) -> jax.ShapeDtypeStruct:
    shape = _pool_shape(geometry, implementation)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(geometry.dtype), sharding=replicated(mesh))


def _placed(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), tree)


def _lower_attention(
    implementation: Implementation, geometry: AttentionGeometry, options: Options, batch: Batch, mesh: Mesh
) -> Lowered:
    device = mesh.devices.flat[0]
    choose_implementation(implementation, geometry, device=device)  # NotImplementedError if it refuses
    metadata = metadata_shapes(
        geometry=geometry,
        implementation=implementation,
        num_tokens=batch.num_tokens,
        num_rows=batch.num_rows,
        blocks_per_seq=_CONTEXT[device.platform] // geometry.block_size,
        has_prefill=batch.has_prefill,
    )
    q, kv, slots, sinks = (
        jax.ShapeDtypeStruct((batch.num_tokens, geometry.q_heads, geometry.head_dim), jnp.dtype(geometry.dtype)),
        jax.ShapeDtypeStruct((batch.num_tokens, geometry.kv_heads, geometry.head_dim), jnp.dtype(geometry.dtype)),
        jax.ShapeDtypeStruct((batch.num_tokens,), jnp.int32),
        jax.ShapeDtypeStruct((geometry.q_heads,), jnp.float32) if options.has_sinks else None,
    )

    def layer(q: Any, k: Any, v: Any, pools: Any, slots: Any, metadata: Any, sinks: Any) -> Any:
        pools = kv_write(k, v, *pools, slots, implementation=implementation)
        attended = paged_attention(
            q,
            *pools,
            metadata,
            scale=geometry.head_dim**-0.5,
            sliding_window=geometry.sliding_windows[0],
            soft_cap=options.soft_cap,
            sinks=sinks,
        )
        return attended, pools

    operands = _placed((q, kv, kv), mesh)
    pools = (_pool(geometry, implementation, mesh),) * 2
    rest = _placed((slots, metadata, sinks), mesh)
    return jax.jit(layer, donate_argnames="pools").lower(*operands, pools, *rest)


def _lower_kv_write(
    implementation: Implementation, geometry: AttentionGeometry, num_tokens: int, mesh: Mesh
) -> Lowered:
    kv = jax.ShapeDtypeStruct((num_tokens, geometry.kv_heads, geometry.head_dim), jnp.dtype(geometry.dtype))
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)

    def write(k: Any, v: Any, pools: Any, slots: Any) -> Any:
        return kv_write(k, v, *pools, slots, implementation=implementation)

    k, v, slots = _placed((kv, kv, slots), mesh)
    return jax.jit(write, donate_argnames="pools").lower(k, v, (_pool(geometry, implementation, mesh),) * 2, slots)


def _lower_rotation(geometry: AttentionGeometry, num_tokens: int, mesh: Mesh) -> Lowered:
    def run(qkv: Any, cos: Any, sin: Any, pools: Any, slots: Any) -> Any:
        return rotate_and_write(qkv, cos, sin, *pools, slots, implementation="mosaic_gpu")

    shape = (num_tokens, geometry.kv_heads, geometry.group + 2, geometry.head_dim)
    qkv = jax.ShapeDtypeStruct(shape, jnp.dtype(geometry.dtype))
    angle = jax.ShapeDtypeStruct((num_tokens, geometry.head_dim // 2), jnp.float32)
    slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    qkv, cos, sin, slots = _placed((qkv, angle, angle, slots), mesh)
    pools = (_pool(geometry, "mosaic_gpu", mesh),) * 2
    return jax.jit(run, donate_argnames="pools").lower(qkv, cos, sin, pools, slots)
