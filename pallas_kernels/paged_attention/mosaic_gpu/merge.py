"""Merges the partial results of query tiles whose keys several thread blocks shared (Pallas Mosaic GPU)."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_operand
from pallas_kernels.numerics import MASKED
from pallas_kernels.paged_attention.mosaic_gpu.decode_plan import DecodePlan, Merge, rows_per_token
from pallas_kernels.paged_attention.mosaic_gpu.product import Warpgroup

LOG2E = math.log2(math.e)
_READ_AT_ONCE = 8192  # numbers: what each read of a partial waits for, several wait for once; a thread holds 64 of them


class Partials(NamedTuple):
    """Softmaxes over some of the keys. Slots that no item wrote, and rows that are padding, hold anything."""

    out: jax.Array  # f32[partials, kv_heads, tile rows, head_dim], rows token-major, heads padded to whole tiles
    log_weight: jax.Array  # f32[partials, kv_heads, >= tile rows], log2 of the sum of exp(score); MASKED: no key


def merge_partials(
    out: jax.Array, partials: Partials, plan: DecodePlan, sinks: jax.Array | None, *, interpret: Any = None
) -> jax.Array:
    """`out` [tokens, q_heads, head_dim] with the rows of the plan's merges set; donated, it changes in place.

    With weights w_i = exp2(log_weight_i - highest) a merged row is sum(w_i out_i) / sum(w_i); a sink counts once, as
    one more weight without a value. Grid (merges, KV heads, tokens of a tile), of which those without work end at
    once; a thread block reads its token's rows of each partial, mostly from the L2 cache.
    """
    kv_heads, tile_rows, head_dim = partials.out.shape[1:]
    num_merges = plan.merges.shape[0]
    if num_merges == 0:
        return out
    group = out.shape[1] // kv_heads
    kernel = _Merge(
        wg=Warpgroup(interpret=bool(interpret)),
        group=group,
        token_rows=rows_per_token(group),
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=out.dtype,
        has_sinks=sinks is not None,
    )
    operands = [*partials, plan.merges]
    if sinks is not None:
        operands.append(sinks_by_row(sinks, kv_heads, kernel.token_rows, kernel.token_rows))
    out_ref: Any = jax.new_ref(out.reshape(-1, head_dim), memory_space=plgpu.GMEM)
    call: Any = pl.kernel(
        kernel.body,
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(num_merges, kv_heads, tile_rows // kernel.token_rows), grid_names=("merge", "head", "token")
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        name="merge_partials",
    )
    call(*(gpu_operand(jnp.asarray(x), interpret=interpret) for x in operands), out_ref)
    return jax.freeze(out_ref).reshape(out.shape)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Merge:
    """The kernel: what is known when it compiles, and its body."""

    wg: Warpgroup
    group: int
    token_rows: int
    kv_heads: int
    head_dim: int
    dtype: Any
    has_sinks: bool

    def body(self, values: Any, log_weights: Any, merges: Any, *refs: Any) -> None:
        """One token of one merge, for one KV head."""
        sinks, out = (refs[0] if self.has_sinks else None), refs[-1]
        merge, head, token = (lax.axis_index(name) for name in ("merge", "head", "token"))
        in_tile = token * self.token_rows

        @pl.when(token < merges[merge, Merge.NUM_TOKENS])
        def _() -> None:
            first, count = merges[merge, Merge.FIRST], merges[merge, Merge.COUNT]
            sink = None if sinks is None else sinks.at[head]
            merged = self._sums(values, log_weights, sink, head, in_tile, first, count).astype(self.dtype)
            row = ((merges[merge, Merge.TOKEN] + token) * self.kv_heads + head) * self.group

            def store(result: Any) -> None:
                result[...] = merged
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(result.at[pl.ds(0, self.group)], out.at[pl.ds(row, self.group)])
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(store, plgpu.SMEM((self.token_rows, self.head_dim), self.dtype))

    def _sums(
        self, values: Any, log_weights: Any, sinks: Any, head: Any, in_tile: Any, first: Any, count: Any
    ) -> jax.Array:
        """f32[token_rows, head_dim]. Each thread knows all weights: they are few, and one number a row."""
        rows = range(self.token_rows)
        at_once = max(_READ_AT_ONCE // (self.token_rows * self.head_dim), 1)

        def add(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            acc, highest, total = carry
            indices = [turn * at_once + index for index in range(at_once)]
            partials = [first + jnp.minimum(index, count - 1) for index in indices]
            parts = [self.wg.load_plain(values.at[part, head, pl.ds(in_tile, self.token_rows)]) for part in partials]
            logs = [
                [jnp.where(index < count, log_weights[part, head, in_tile + row], MASKED) for row in rows]
                for index, part in zip(indices, partials, strict=True)
            ]
            highest, before = [_highest([highest[row], *(log[row] for log in logs)]) for row in rows], highest
            decay = [jnp.exp2(old - new) for old, new in zip(before, highest, strict=True)]
            total = [total[row] * decay[row] for row in rows]
            acc = acc * self._by_row(decay)
            for log, part in zip(logs, parts, strict=True):
                weights = [jnp.exp2(log[row] - highest[row]) for row in rows]
                total = [total[row] + weights[row] for row in rows]
                acc = acc + part * self._by_row(weights)
            return acc, highest, total

        if sinks is None:
            highest, total = [jnp.float32(MASKED) for _ in rows], [jnp.float32(0.0) for _ in rows]
        else:
            highest, total = [sinks[row] for row in rows], [jnp.float32(1.0) for _ in rows]
        start = self.wg.full_plain((self.token_rows, self.head_dim), 0.0), highest, total
        acc, _, total = lax.fori_loop(0, lax.div(count + jnp.int32(at_once - 1), jnp.int32(at_once)), add, start)
        return acc * self._by_row([1.0 / each for each in total])

    def _by_row(self, scalars: list[jax.Array]) -> jax.Array:
        """f32[token_rows, head_dim]: each row filled with its scalar."""
        shape = (self.token_rows, self.head_dim)
        row = self.wg.iota_plain(shape, 0)
        filled = self.wg.full_plain(shape, scalars[0])
        for index, scalar in enumerate(scalars[1:], start=1):
            filled = jnp.where(row == index, scalar, filled)
        return filled


def _highest(scalars: list[jax.Array]) -> jax.Array:
    highest = scalars[0]
    for scalar in scalars[1:]:
        highest = jnp.maximum(highest, scalar)
    return highest


def sinks_by_row(sinks: jax.Array, kv_heads: int, tile_rows: int, token_rows: int) -> jax.Array:
    """f32[kv_heads, tile_rows]: log2(e) times the sink of each row's head."""
    by_head = sinks.reshape(kv_heads, -1).astype(jnp.float32) * LOG2E
    by_head = jnp.pad(by_head, ((0, 0), (0, token_rows - by_head.shape[1])))
    return jnp.tile(by_head, (1, tile_rows // token_rows))
