"""The Flax model split once into its graph and a flat dict of parameters; a step puts them together while tracing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.errors import ConfigError
from jaxserve.layers.attention import AttentionBackend
from jaxserve.layers.numerics import Numerics
from jaxserve.models.base import CausalLM, DecoderConfig, WeightRule
from jaxserve.models.head import DraftHead
from jaxserve.models.registry import family as family_of
from jaxserve.parallel.mesh import TENSOR, AnyMesh, LogicalAxes, device_of, platform_of, sharding
from jaxserve.parallel.shards import WHOLE, Shards
from jaxserve.sampling.vocabulary import BLOCK_TOKENS
from pallas_kernels.dispatch import Implementation
from pallas_kernels.matmul import to_panels
from pallas_kernels.paged_attention import AttentionGeometry, choose_implementation

logger = logging.getLogger(__name__)

Params = dict[str, jax.Array]  # dotted path -> value


class ModelGraph:
    """A model without values: built abstract, bound to parameters inside a jitted function."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        backend: AttentionBackend,
        family: type[CausalLM] | type[DraftHead] | None = None,
        numerics: Numerics | None = None,
    ) -> None:
        """`family`: the class of the model; None: what the config's architecture names. `numerics`: those of a model
        whose parameters it shares; None: what is fastest for this dtype and backend."""
        self.config = _split(config, backend.mesh.shape[TENSOR])
        # XLA splits its own products over a mesh; of a custom call it would gather the operands.
        native = backend.implementation == "native_cpu" and backend.mesh.size == 1
        self.numerics = numerics or Numerics.for_platform(platform_of(backend.mesh), dtype, native=native)
        self._family: Any = family or family_of(config.architecture)
        model = self._family(self.config, numerics=self.numerics, backend=backend)
        self._graph, state = nnx.split(model)
        self._variables = {".".join(map(str, path)): (path, value) for path, value in nnx.to_flat_state(state)}
        self.backend = backend
        self.mesh: AnyMesh = backend.mesh

    @property
    def description(self) -> str:
        """Names all that the graph was made of, so that graphs of one description trace alike."""
        family = f"{self._family.__module__}.{self._family.__qualname__}"
        return f"{family} {self.config} {self.numerics} {self.backend}"

    def bind(self, params: Mapping[str, jax.Array]) -> Any:
        """The `CausalLM` or `DraftHead` with these parameters; one that is left out stays abstract, and must not be
        used."""
        flat = [(path, params.get(name, variable.get_value())) for name, (path, variable) in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every parameter."""
        return {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(self.mesh, self.axes(name)))
            for name, value in ((name, variable.get_value()) for name, (_, variable) in self._variables.items())
        }

    def axes(self, name: str) -> LogicalAxes:
        """The logical axes of a parameter."""
        return self._variables[name][1].get_metadata()["axes"]

    def laid_out(self, name: str, value: np.ndarray) -> np.ndarray:
        """A parameter's value as its products want it to lie."""
        matrix_axes = self._variables[name][1].get_metadata()["matrix_axes"]
        if matrix_axes is None:
            return value
        matrices = value.reshape(*value.shape[: value.ndim - matrix_axes], -1, value.shape[-1])
        return to_panels(matrices, self.numerics.panel_columns).reshape(value.shape)

    def weight_rules(self) -> list[WeightRule]:
        """How every parameter is made of a checkpoint."""
        return self._family.weight_rules(self.config)

    def unused_tensors(self) -> tuple[str, ...]:
        """Patterns of a checkpoint's tensors that this model has no use for."""
        return self._family.unused_tensors

    def kv_cache_spec(self) -> KVCacheSpec:
        """The KV cache that the model's attention reads."""
        return KVCacheSpec(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_cached_kv_heads,
            head_dim=self.config.head_dim,
            block_size=self.backend.geometry.block_size,
            dtype=self.backend.geometry.dtype,
            implementation=self.backend.implementation,
            num_shards=self.config.num_shards,
        )

    @property
    def vocabulary_shards(self) -> Shards:
        """How logits lie on the devices."""
        return Shards(TENSOR, self.config.num_shards) if self.config.num_shards > 1 else WHOLE

    def head_names(self) -> list[str]:
        """The parameters that `logits` reads."""
        prefixes = self._family.head_prefixes(self.config)
        return [name for name in self._variables if name.startswith(prefixes)]


def choose_backend(
    config: DecoderConfig,
    *,
    dtype: DTypeLike,
    block_size: int,
    mesh: AnyMesh,
    asked: Implementation | None = None,
) -> AttentionBackend:
    """The attention implementation for this model on this mesh; `ConfigError` where it cannot be split or served."""
    _check_divisible(config, mesh.shape[TENSOR])
    split = _split(config, mesh.shape[TENSOR])
    geometry = AttentionGeometry(
        q_heads=split.num_q_heads // split.num_shards,
        kv_heads=split.num_cached_kv_heads // split.num_shards,
        head_dim=config.head_dim,
        block_size=block_size,
        dtype=jnp.dtype(dtype).name,
        sliding_windows=(config.sliding_window,),
    )
    try:
        chosen, refusals = choose_implementation(asked, geometry, device=device_of(mesh))
    except NotImplementedError as refusal:
        raise ConfigError(f"attention_backend {asked or 'auto'!r}: {refusal}") from refusal
    for refusal in refusals:
        logger.warning("attention runs on %s, because %s", chosen, refusal)
    return AttentionBackend(mesh=mesh, implementation=chosen, geometry=geometry)


MAX_TENSOR_PARALLEL_SIZE = 64  # the largest that an error message offers


def _split(config: DecoderConfig, num_shards: int) -> DecoderConfig:
    """The model laid out for so many devices: the vocabulary in whole blocks on each, as the sampler wants them."""
    padding = -config.vocab_size % (num_shards * BLOCK_TOKENS) if num_shards > 1 else 0
    return replace(config, num_shards=num_shards, vocab_padding=padding)


def _check_divisible(config: DecoderConfig, num_shards: int) -> None:
    if config.can_split_over(num_shards):
        return
    working = [str(size) for size in range(1, MAX_TENSOR_PARALLEL_SIZE + 1) if config.can_split_over(size)]
    raise ConfigError(
        f"tensor_parallel_size {num_shards} does not fit the model: it must divide num_attention_heads "
        f"({config.num_q_heads}) and intermediate_size ({config.ffn_size}), and divide num_key_value_heads "
        f"({config.num_kv_heads}) or be a multiple of it; sizes that work: {', '.join(working)}"
    )
