"""EAGLE-3's draft head (Li et al., 2025), as SafeAILab, SGLang, SpecForge and the speculators project publish it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.errors import CheckpointError
from jaxserve.layers.attention import Attention, AttentionBackend, AttentionShape, StepInputs
from jaxserve.layers.linear import Embedding, Linear
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.parameter import parameter
from jaxserve.layers.rope import Rotation, rotation
from jaxserve.layers.stack import apply_layers
from jaxserve.models.base import WeightRule
from jaxserve.models.head import HeadConfig
from jaxserve.models.llama import layer_rules, plain_rule, vocabulary_rule

NOT_DRAFTED = -1  # place of a token that the head cannot guess


class Eagle3Layer(nnx.Module):
    """A decoder layer whose attention sees the token's embedding beside the state, each normalised on its own."""

    def __init__(self, config: HeadConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        norm = partial(RMSNorm, config.hidden_size, epsilon=config.norm_epsilon, numerics=numerics)
        self.attention_norm = norm()  # of the embedding
        self.hidden_norm = norm()
        self.attention = Attention(
            AttentionShape(
                hidden_size=config.hidden_size,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_cached_kv_heads,
                head_dim=config.head_dim,
                in_features=2 * config.hidden_size,
            ),
            numerics=numerics,
            backend=backend,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.ffn_size,
            numerics=numerics,
            num_shards=config.num_shards,
            bias=config.mlp_bias,
        )
        self.norm_before_residual = config.norm_before_residual

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        cache: LayerCache,
        embedded: Float[Array, "tokens hidden"],
        angles: Rotation,
        inputs: StepInputs,
    ) -> tuple[Float[Array, "tokens hidden"], LayerCache]:
        normed = self.hidden_norm(x)
        both = jnp.concatenate([self.attention_norm(embedded), normed], axis=-1)
        residual = normed if self.norm_before_residual else x
        x, cache = self.attention(both, cache, angles, inputs, residual=residual)
        return self.mlp(x, norm=self.mlp_norm, num_tokens=inputs.num_tokens), cache


class Eagle3(nnx.Module):
    """Three of the model's inner hidden states as one, a decoder layer, and a head over a smaller vocabulary.

    # position p reads   what entered three layers at p (combined), or its own state of p - 1 | token p + 1
    #            gives   a state; normalised, its logits are of token p + 2
    """

    # t2d says of each token whether d2t leads to it; d2t alone is read.
    unused_tensors: ClassVar[tuple[str, ...]] = ("t2d",)

    def __init__(self, config: HeadConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size, numerics=numerics)
        self.combination = Linear(config.num_features, (config.hidden_size,), axes=(None, None), numerics=numerics)
        self.layers = nnx.List([Eagle3Layer(config, numerics=numerics, backend=backend)])
        self.norm = RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, numerics=numerics)
        rows = config.padded_draft_vocab_size if config.has_head else config.padded_vocab_size
        self.head = Embedding(rows, config.hidden_size, numerics=numerics)
        # A token's row of the head, NOT_DRAFTED where it has none.
        places = parameter((config.padded_vocab_size,), ("vocab",), jnp.int32) if config.has_token_map else None
        self.places = places
        self.rope = config.rope

    def combine(self, features: Float[Array, "tokens features"]) -> Float[Array, "tokens hidden"]:
        return self.combination(features)

    def advance(
        self,
        token_ids: Int[Array, " tokens"],
        states: Float[Array, "tokens hidden"],
        positions: Int[Array, " tokens"],
        caches: Sequence[LayerCache],
        inputs: StepInputs,
    ) -> tuple[Float[Array, "tokens hidden"], list[LayerCache]]:
        angles = jax.lax.optimization_barrier(rotation(self.rope, positions))
        xs, written = apply_layers(self.layers, states, caches, self.embedding(token_ids), angles, inputs)
        return xs[-1], written

    def logits(
        self, states: Float[Array, "rows hidden"], num_rows: Int[Array, ""] | None = None
    ) -> Float[Array, "rows vocab"]:
        logits = self.head.logits(self.norm(states), num_rows)
        if self.places is None:
            return logits
        places = self.places[...]
        return jnp.where(places == NOT_DRAFTED, -jnp.inf, jnp.take(logits, places, axis=1, mode="clip"))

    @staticmethod
    def weight_rules(config: HeadConfig) -> list[WeightRule]:
        hidden = config.hidden_size
        rules = [
            plain_rule("combination.weight", "fc.weight", (hidden, config.num_features)),
            plain_rule("norm.weight", "norm.weight", (hidden,)),
            plain_rule("layers.0.hidden_norm.weight", f"{config.layer_prefix}.hidden_norm.weight", (hidden,)),
            *layer_rules(config, "layers.0", config.layer_prefix, qkv_in_features=2 * hidden),
        ]
        if config.has_embedding:
            rules.append(vocabulary_rule(config, "embedding.weight", "embed_tokens.weight"))
        if config.has_head:
            rules.append(_head_rule(config))
        if config.has_token_map:
            rules.append(_places_rule(config))
        return rules

    @staticmethod
    def head_prefixes(config: HeadConfig) -> tuple[str, ...]:
        return ("norm.", "head.", "places")


def _head_rule(config: HeadConfig) -> WeightRule:
    if not config.has_token_map:
        return vocabulary_rule(config, "head.weight", "lm_head.weight")
    rule = plain_rule("head.weight", "lm_head.weight", (config.draft_vocab_size, config.hidden_size))
    padding = config.padded_draft_vocab_size - config.draft_vocab_size

    def assemble(tensors: Sequence[np.ndarray]) -> np.ndarray:
        return np.pad(tensors[0], ((0, padding), (0, 0)))

    return replace(rule, param_shape=(config.padded_draft_vocab_size, config.hidden_size), assemble=assemble)


def _places_rule(config: HeadConfig) -> WeightRule:
    """`d2t` holds, for each token of the head's vocabulary, how much larger its id is in the model's.

    # d2t     [0, 3, 3]: the head's tokens 0 1 2 are the model's 0 4 5
    # places  [0, -1, -1, -1, 1, 2, -1, ..]
    """

    def assemble(tensors: Sequence[np.ndarray]) -> np.ndarray:
        token_ids = tensors[0].astype(np.int64) + np.arange(config.draft_vocab_size)
        if token_ids.min() < 0 or token_ids.max() >= config.vocab_size or len(np.unique(token_ids)) < len(token_ids):
            raise CheckpointError(
                f"d2t leads to tokens from {token_ids.min()} to {token_ids.max()}, "
                f"{len(np.unique(token_ids))} in all; it must lead to {config.draft_vocab_size} different tokens of "
                f"the model's {config.vocab_size}"
            )
        places = np.full(config.padded_vocab_size, NOT_DRAFTED, np.int32)
        places[token_ids] = np.arange(config.draft_vocab_size)
        return places

    return WeightRule(
        param="places",
        sources=("d2t",),
        shapes=((config.draft_vocab_size,),),
        param_shape=(config.padded_vocab_size,),
        assemble=assemble,
        dtype=np.dtype(np.int32),
    )
