"""`InstantModel`: a model with the arguments of a real one and next to no arithmetic, for timing what surrounds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.layers.attention import AttentionBackend, StepInputs
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.parameter import parameter
from jaxserve.layers.rope import RopeConfig
from jaxserve.models.base import DecoderConfig, WeightRule

_PARAMETERS_PER_LAYER = 6  # as Llama's: two norms, q k and v, out, gate and up, down


def instant_config(max_model_len: int) -> DecoderConfig:
    """As many layers as an 8B model has, with a vocabulary that takes no time to choose from."""
    return DecoderConfig(
        architecture="InstantModel",
        vocab_size=128,
        hidden_size=64,
        ffn_size=64,
        num_layers=32,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        norm_epsilon=1e-6,
        rope=RopeConfig(theta=1e4, head_dim=64),
        max_position_embeddings=max_model_len,
        tie_embeddings=True,
    )


class InstantModel(nnx.Module):
    """Says token 0 whatever it reads. It reads every parameter, lest a program drop one."""

    unused_tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: DecoderConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        def scalar() -> nnx.Param:
            return parameter((1,), (None,), numerics.activations)

        self.embedding = scalar()
        self.layers = nnx.List([scalar() for _ in range(config.num_layers * _PARAMETERS_PER_LAYER)])
        self.norm = scalar()
        self.hidden_size, self.vocab_size = config.hidden_size, config.padded_vocab_size

    def hidden_states(
        self, token_ids: jax.Array, positions: jax.Array, caches: Sequence[LayerCache], inputs: StepInputs
    ) -> tuple[jax.Array, jax.Array | None, list[LayerCache]]:
        read = reduce(add, (value[...] for value in (*self.layers, self.norm)), self.embedding[...])
        return jnp.broadcast_to(read, (len(token_ids), self.hidden_size)), None, list(caches)

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        return jnp.broadcast_to(hidden[:, :1] * self.embedding[...], (len(hidden), self.vocab_size))

    @staticmethod
    def weight_rules(config: DecoderConfig) -> list[WeightRule]:
        return []

    @staticmethod
    def head_prefixes(config: DecoderConfig) -> tuple[str, ...]:
        return ("embedding",)
