"""Self-attention over the paged KV cache: projections, rotation, cache write, attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxserve.cache.kv_cache import LayerCache, pool_partition_spec
from jaxserve.layers.linear import Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.rope import Rotation
from jaxserve.parallel.mesh import EVERYWHERE, TENSOR, AnyMesh, partition_spec
from pallas_kernels.dispatch import Implementation
from pallas_kernels.kv_write import rotate_and_write
from pallas_kernels.paged_attention import AttentionGeometry, AttentionMetadata, paged_attention


@partial(jax.tree_util.register_dataclass, data_fields=["metadata", "kv_slots", "num_tokens"], meta_fields=[])
@dataclass(frozen=True)
class StepInputs:
    """What every layer needs to know of the step's batch."""

    metadata: AttentionMetadata
    kv_slots: jax.Array  # i32[tokens], where each token's K and V go: block * block_size + offset
    num_tokens: jax.Array  # i32[], behind which all is padding


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """Where attention runs: the mesh, and which implementation for which sizes."""

    mesh: AnyMesh
    implementation: Implementation
    geometry: AttentionGeometry  # of one device's heads


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention layer."""

    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    in_features: int | None = None  # width of what q, k and v are made of; None: hidden_size

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023).

    The fused projection keeps each KV head with its query heads, so that one mesh axis splits all three:
    # qkv.weight [kv_heads, group + 2, head_dim, hidden]
    #             per KV head: | q .. q (group) | k | v |
    """

    def __init__(
        self,
        shape: AttentionShape,
        *,
        numerics: Numerics,
        backend: AttentionBackend,
        bias: bool = False,
        out_bias: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        qkv_shape = (shape.num_kv_heads, shape.group + 2, shape.head_dim)
        in_features = shape.in_features or shape.hidden_size
        self.qkv = Linear(in_features, qkv_shape, axes=("kv_heads", None, None, None), numerics=numerics, bias=bias)
        q_features = shape.num_q_heads * shape.head_dim
        self.out = Linear(q_features, (shape.hidden_size,), axes=(None, "q_features"), numerics=numerics, bias=out_bias)
        self.shape = shape
        self.backend = backend
        self.sliding_window = sliding_window

    def __call__(
        self,
        x: Float[Array, "tokens in_features"],
        cache: LayerCache,
        angles: Rotation,
        inputs: StepInputs,
        *,
        residual: Float[Array, "tokens hidden"],
        norm: RMSNorm | None = None,
    ) -> tuple[Float[Array, "tokens hidden"], LayerCache]:
        """`residual + attention(norm(x))`, and the cache with this step's K and V."""
        qkv = self.qkv(x, norm=norm, num_tokens=inputs.num_tokens)  # [tokens, kv_heads, group + 2, head_dim]
        attended, cache = self._attend(qkv, angles, cache, inputs)
        attended = attended.reshape(x.shape[0], -1)
        return self.out(attended, residual=residual, num_tokens=inputs.num_tokens), cache

    def _attend(
        self, qkv: jax.Array, angles: Rotation, cache: LayerCache, inputs: StepInputs
    ) -> tuple[jax.Array, LayerCache]:
        run = partial(
            _rotate_write_attend,
            scale=self.shape.head_dim**-0.5,
            sliding_window=self.sliding_window,
        )
        if self.backend.mesh.size > 1:  # kernels see one device's heads; nothing crosses devices here
            heads = partition_spec((None, "kv_heads"))
            pool = pool_partition_spec(block_axis=None)
            run = jax.shard_map(  # inside that of `on_each_data_shard`
                run,
                in_specs=(heads, EVERYWHERE, (pool, pool), EVERYWHERE),
                out_specs=(heads, (pool, pool)),
                axis_names={TENSOR},
                check_vma=False,
            )
        return run(qkv, angles, cache, inputs)


def _rotate_write_attend(
    qkv: Float[Array, "tokens kv_heads parts head_dim"],
    angles: Rotation,
    cache: LayerCache,
    inputs: StepInputs,
    *,
    scale: float,
    sliding_window: int | None,
) -> tuple[Float[Array, "tokens kv_heads group head_dim"], LayerCache]:
    """Rotate, write this step's K and V, then attend to all of each sequence's; new blocks are readable at once."""
    implementation = inputs.metadata.implementation
    q, k_pool, v_pool = rotate_and_write(qkv, *angles, *cache, inputs.kv_slots, implementation=implementation)
    cache = (k_pool, v_pool)
    flat = q.reshape(q.shape[0], -1, q.shape[-1])  # [tokens, q_heads, head_dim]
    attended = paged_attention(flat, *cache, inputs.metadata, scale=scale, sliding_window=sliding_window)
    return attended.reshape(q.shape).astype(jnp.result_type(q)), cache
