"""Matrix products of one warpgroup, and the register arrays they make: wgmma on a GPU, a plain dot when interpreted."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_interpreter_models_memory, gpu_load, gpu_store_slowly

_THREADS = 128  # of a warpgroup
ROWS = 64  # of wgmma's first operand, per warpgroup; a larger tile has a multiple of it

_ACCUMULATOR: Any = vars(plgpu)["ACC"]  # its import in there is not an export to type checkers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Warpgroup:
    """What one compute warpgroup does with tiles.

    The interpreters of Pallas know neither the layouts of registers nor, in every JAX version, wgmma. With
    `interpret` each method is the same arithmetic on plain arrays, so that all around it (work lists, barriers,
    masks, the online softmax) is the kernel's own code in a run on the CPU, where newer versions also find what copies
    and warpgroups do not wait for. What such a run cannot show: the layouts, the swizzled addresses, the fence between
    a store and the product that reads it.
    """

    interpret: bool

    def tile(self, shape: tuple[int, int], dtype: Any, *, stages: int | None = None) -> Any:
        """Shared memory for operands of products; `stages` adds a leading axis.

        Swizzled, in tiles of 8 rows, as TMA writes and wgmma reads it: slices of rows start at multiples of 8.
        """
        full = shape if stages is None else (stages, *shape)
        if self.interpret:
            return plgpu.SMEM(full, dtype)
        itemsize = jnp.dtype(dtype).itemsize
        swizzle = plgpu.find_swizzle(shape[1] * itemsize * 8)
        tiling = plgpu.TilingTransform((8, swizzle // itemsize))
        return plgpu.SMEM(full, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    def either(self, *refs: Any) -> Any:
        """Buffers of which only one is in use at a time; the kernel gets a sequence of refs."""
        return refs if self.interpret and not gpu_interpreter_models_memory() else plgpu.RefUnion(*refs)

    def full(self, shape: tuple[int, int], value: float) -> jax.Array:
        """f32[rows, columns], laid out as the result of a product."""
        return self._as(jnp.full(shape, value, jnp.float32), plgpu.Layout.WGMMA)

    def full_rows(self, rows: int, value: float) -> jax.Array:
        """f32[rows], laid out as a reduction over the columns of a product."""
        return self._as(jnp.full((rows,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def load(self, ref: Any) -> jax.Array:
        """[rows, columns] from shared memory, laid out as the result of a product."""
        return ref[...] if self.interpret else gpu_load(ref, layout=plgpu.Layout.WGMMA)

    def load_rows(self, ref: Any) -> jax.Array:
        """[rows] from global or shared memory, laid out as a reduction over the columns of a product."""
        return ref[...] if self.interpret else gpu_load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def store_slowly(self, ref: Any, value: jax.Array) -> None:
        """[rows, columns] to shared memory in a layout that may have bank conflicts."""
        if self.interpret:
            ref[...] = value
        else:
            gpu_store_slowly(ref, value)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """i32[rows, columns], laid out as the result of a product."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def full_plain(self, shape: tuple[int, int], value: Any) -> jax.Array:
        """f32[rows, columns], laid out as the threads find it in memory."""
        return self._as(jnp.full(shape, value, jnp.float32), _plain(shape))

    def load_plain(self, ref: Any) -> jax.Array:
        """f32[rows, columns] from global memory, laid out as the threads find it."""
        return ref[...] if self.interpret else gpu_load(ref, layout=_plain(ref.shape), optimized=False)

    def iota_plain(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """i32[rows, columns], laid out as f32 of that shape in memory."""
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_plain(shape))

    def over_columns(self, rows: jax.Array, columns: int) -> jax.Array:
        """[rows] -> [rows, columns]."""
        return lax.broadcast_in_dim(rows, (rows.shape[0], columns), (0,))

    def scores(self, q: Any, k: Any, meanwhile: Callable[[], None] | None = None) -> jax.Array:
        """f32[rows, keys] = q @ k.T of tiles in shared memory, [rows, head_dim] and [keys, head_dim].

        `meanwhile` runs between the issue of the product and the wait for it; it must not touch either operand.
        """
        if self.interpret:
            product = self._dot(q[...], k[...], ((1,), (1,)))
            if meanwhile is not None:
                meanwhile()
            return product

        def issue(result: Any) -> jax.Array:
            plgpu.wgmma(result, q, k.T)
            if meanwhile is not None:
                meanwhile()
            return result[...]

        return pl.run_scoped(issue, _ACCUMULATOR((q.shape[0], k.shape[0]), jnp.float32))

    def add_product(
        self, acc: jax.Array, p: jax.Array, v: Any, meanwhile: Callable[[], None] | None = None
    ) -> jax.Array:
        """f32[rows, head_dim] = acc + p @ v, with p [rows, keys] in registers and v [keys, head_dim] in shared memory.

        p has v's dtype. The accumulator stays in its registers: `acc` is spent. `meanwhile` as in `scores`.
        """
        if self.interpret:
            total = acc + self._dot(p, v[...], ((1,), (0,)))
            if meanwhile is not None:
                meanwhile()
            return total

        def issue(total: Any) -> None:
            plgpu.wgmma(total, p, v)
            if meanwhile is not None:
                meanwhile()

        total: Any = pl.run_state(issue)(_ACCUMULATOR.init(acc))
        return total

    def _dot(self, a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
        """f32: the interpreted product of what was just read from shared memory."""
        plgpu.commit_smem()  # wgmma reads as copies write, so nothing stands between them; loads are of another path
        return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)

    def _as(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)


def _plain(shape: tuple[int, ...]) -> Any:
    """Neighbouring elements in neighbouring threads, as many side by side in each as one access of 16 bytes moves."""
    a_thread = math.prod(shape) // _THREADS
    return plgpu.Layout.WG_STRIDED(shape, vec_size=math.gcd(a_thread, 4))


def with_more_rows(x: jax.Array, extra: int) -> jax.Array:
    """[rows + extra, ...]: zeros at the end; x itself where there is nothing to add."""
    return jnp.pad(x, ((0, extra), *((0, 0),) * (x.ndim - 1))) if extra else x
