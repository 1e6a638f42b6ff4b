"""Programs that break one rule each on purpose: a check that lets one of them pass proves nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from jaxserve.parallel.mesh import TENSOR, replicated
from pallas_kernels.kv_write import kv_write
from tests.compile_check.jobs import Job, Limits
from tests.compile_check.targets import Target

_H100 = Target(device="h100", num_devices=1)
_FOUR_H100 = Target(device="h100", num_devices=4)
_V5E = Target(device="v5e", num_devices=1)

_POOL = (1009, 16, 8, 128)
_POOL_ELEMENTS = 1009 * 16 * 8 * 128
_VOCAB = 128256


def must_fail_jobs() -> list[Job]:
    """One job for each rule, `expected` being a part of what its failure must say."""
    pools = Limits(pool_elements=_POOL_ELEMENTS)
    unaligned = _job("a slice at an odd address", _H100, _lower_unaligned_slice, "do not start at a multiple of 256")
    return [
        *([unaligned] if jax.__version_info__ >= (0, 11) else []),  # before, XLA copies what a kernel gets of an array
        _job("shared memory over budget", _H100, partial(_lower_gpu_kernel, 1024), "shared memory"),
        _job("registers that spill", _H100, partial(_lower_gpu_kernel, 256), "spills registers"),
        _job(
            "products one after another",
            _H100,
            _lower_serialized_products,
            "wgmma.mma_async instructions are serialized",
        ),
        _job("VMEM over budget", _V5E, _lower_tpu_kernel, "vmem"),
        _job("a kernel without a report", _H100, _lower_no_kernel, "no kernel left a report"),
        _job("a pool that is copied", _H100, _lower_pool_copy, "as large as a pool: copy", pools),
        _job("a pool that a fusion makes", _H100, _lower_pool_fusion, "fusion, multiply", pools),
        _job("a pool that a kernel makes", _H100, _lower_pool_kernel, "as large as a pool: custom-call", pools),
        _job(
            "a pool that is not donated",
            _H100,
            _lower_pool_kept,
            "results of 0 bytes lie in donated arguments",
            Limits(min_alias_bytes=2 * 2 * _POOL_ELEMENTS),
        ),
        _job(
            "temporaries as large as a pool",
            _H100,
            _lower_large_temporary,
            "temporaries of",
            Limits(max_temp_bytes=2 * _POOL_ELEMENTS),
        ),
        _job("a sort of the vocabulary", _H100, _lower_sort, "sorts 128256", Limits(vocab_size=_VOCAB)),
        _job("too many collectives", _FOUR_H100, _lower_sums, "2 collectives", Limits(max_collectives=1)),
    ]


def _job(name: str, target: Target, lower: Any, expected: str, limits: Limits | None = None) -> Job:
    has_kernels = lower not in (_lower_pool_fusion, _lower_large_temporary, _lower_sort, _lower_sums)
    return Job(
        name=f"must fail: {name}",
        target=target,
        lower=lower,
        limits=limits or Limits(),
        has_kernels=has_kernels,
        expected=expected,
    )


def _lower_gpu_kernel(size: int, mesh: Mesh) -> Lowered:
    """Normalises a [size, 256] array that 128 threads hold in registers: 512 floats a thread at 256 rows."""
    shape = (size, 256)

    def normalise(x_ref: Any, out_ref: Any) -> None:
        def body(rows: Any, arrived: Any) -> None:
            plgpu.copy_gmem_to_smem(x_ref, rows, arrived)
            plgpu.barrier_wait(arrived)
            x = rows[...].astype(jnp.float32)
            rows[...] = (x / jnp.sum(jnp.exp(x))).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(rows, out_ref)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(body, plgpu.SMEM(shape, jnp.bfloat16), plgpu.Barrier())

    out = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    grid = plgpu.Mesh(grid=(1,), grid_names=("block",))
    kernel: Any = pl.kernel(normalise, out_type=out, mesh=grid)
    return jax.jit(kernel).lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated(mesh)))


def _lower_serialized_products(mesh: Mesh) -> Lowered:
    """Two products at once, whose results take 128 registers of a thread each."""
    rows, inner, columns = 64, 64, 256
    tiling = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

    def multiply(x_ref: Any, y_ref: Any, out_ref: Any) -> None:
        def body(x: Any, y: Any, first: Any, second: Any, arrived: Any) -> None:
            plgpu.copy_gmem_to_smem(x_ref, x, arrived)
            plgpu.copy_gmem_to_smem(y_ref, y, arrived)
            plgpu.barrier_wait(arrived)
            plgpu.wgmma(first, x, y)
            plgpu.wgmma(second, x, y)
            plgpu.wgmma_wait(0)
            out_ref[...] = first[...] * second[...]

        pl.run_scoped(
            body,
            plgpu.SMEM((rows, inner), jnp.bfloat16, transforms=tiling),
            plgpu.SMEM((inner, columns), jnp.bfloat16, transforms=tiling),
            plgpu.ACC((rows, columns), jnp.float32),
            plgpu.ACC((rows, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        )

    grid = plgpu.Mesh(grid=(1,), grid_names=("block",))
    kernel: Any = pl.kernel(multiply, out_type=jax.ShapeDtypeStruct((rows, columns), jnp.float32), mesh=grid)
    x, y = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated(mesh))
        for shape in ((rows, inner), (inner, columns))
    )
    return jax.jit(kernel).lower(x, y)


def _lower_unaligned_slice(mesh: Mesh) -> Lowered:
    """A kernel that reads 256 numbers of a larger argument, from the fourth on."""

    def double(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] * 2

    grid = plgpu.Mesh(grid=(1,), grid_names=("block",))
    kernel: Any = pl.kernel(double, out_type=jax.ShapeDtypeStruct((256,), jnp.int32), mesh=grid)
    x = jax.ShapeDtypeStruct((1024,), jnp.int32, sharding=replicated(mesh))
    return jax.jit(lambda x: kernel(x[3:259])).lower(x)


def _lower_tpu_kernel(mesh: Mesh) -> Lowered:
    def double(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] * 2

    shape = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=replicated(mesh))  # 256 MiB in one block
    return jax.jit(pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(shape.shape, shape.dtype))).lower(shape)


def _lower_no_kernel(mesh: Mesh) -> Lowered:
    return jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=replicated(mesh)))


def _lower_pool_copy(mesh: Mesh) -> Lowered:
    """The kernel writes in place, and then somebody asks for the pool as it was."""

    def write(k: Any, k_pool: Any, v_pool: Any, slots: Any) -> Any:
        return k_pool, kv_write(k, k, k_pool, v_pool, slots, implementation="mosaic_gpu")

    return jax.jit(write, donate_argnums=(1, 2)).lower(*_written(mesh))


def _lower_pool_fusion(mesh: Mesh) -> Lowered:
    """One result that is the pool scaled, in a fusion beside a sum of it."""

    def scale(pool: Any) -> Any:
        return pool * 2, jnp.sum(pool, axis=-1)

    return jax.jit(scale, donate_argnums=0).lower(jax.ShapeDtypeStruct(_POOL, jnp.bfloat16, sharding=replicated(mesh)))


def _lower_pool_kernel(mesh: Mesh) -> Lowered:
    """A kernel that copies the pool's first block to a pool of its own."""

    def copy(pool_ref: Any, out_ref: Any) -> None:
        def body(rows: Any, arrived: Any) -> None:
            plgpu.copy_gmem_to_smem(pool_ref.at[0, 0], rows, arrived)
            plgpu.barrier_wait(arrived)
            plgpu.copy_smem_to_gmem(rows, out_ref.at[0, 0])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(body, plgpu.SMEM(_POOL[2:], jnp.bfloat16), plgpu.Barrier())

    grid = plgpu.Mesh(grid=(1,), grid_names=("block",))
    kernel: Any = pl.kernel(copy, out_type=jax.ShapeDtypeStruct(_POOL, jnp.bfloat16), mesh=grid)
    return jax.jit(kernel).lower(jax.ShapeDtypeStruct(_POOL, jnp.bfloat16, sharding=replicated(mesh)))


def _lower_pool_kept(mesh: Mesh) -> Lowered:
    """Written pools whose callers keep the old ones."""

    def write(k: Any, k_pool: Any, v_pool: Any, slots: Any) -> Any:
        return kv_write(k, k, k_pool, v_pool, slots, implementation="mosaic_gpu")

    return jax.jit(write).lower(*_written(mesh))


def _written(mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Eight tokens' keys, two pools, and slots."""
    pool = jax.ShapeDtypeStruct(_POOL, jnp.bfloat16, sharding=replicated(mesh))
    k = jax.ShapeDtypeStruct((8, *_POOL[2:]), jnp.bfloat16, sharding=replicated(mesh))
    return k, pool, pool, jax.ShapeDtypeStruct((8,), jnp.int32, sharding=replicated(mesh))


def _lower_large_temporary(mesh: Mesh) -> Lowered:
    """A product as large as the pool, of which little is asked."""

    def largest(pool: Any, weight: Any) -> Any:
        return jnp.argmax(pool.reshape(-1, weight.shape[0]) @ weight, axis=0)

    pool = jax.ShapeDtypeStruct(_POOL, jnp.bfloat16, sharding=replicated(mesh))
    return jax.jit(largest).lower(pool, jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=replicated(mesh)))


def _lower_sort(mesh: Mesh) -> Lowered:
    logits = jax.ShapeDtypeStruct((8, _VOCAB), jnp.float32, sharding=replicated(mesh))
    return jax.jit(lambda logits: jnp.sort(logits, axis=-1)).lower(logits)


def _lower_sums(mesh: Mesh) -> Lowered:
    """Two products, each of which sums over the devices."""

    def products(x: Any, first: Any, second: Any) -> Any:
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ first) @ second, replicated(mesh))

    def placed(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    weight = placed((4096, 4096), PartitionSpec(TENSOR, None))
    x = placed((64, 4096), PartitionSpec(None, TENSOR))
    return jax.jit(products).lower(x, weight, weight)
