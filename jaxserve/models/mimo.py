"""MiMo-7B: Qwen2's layers, which are Llama's with biases in q, k and v; and its multi-token prediction head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.layers.attention import AttentionBackend, StepInputs
from jaxserve.layers.linear import Embedding, Linear
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.rope import rotation
from jaxserve.layers.stack import apply_layers
from jaxserve.models.base import WeightRule
from jaxserve.models.head import HeadConfig
from jaxserve.models.llama import DecoderLayer, Llama, layer_rules, plain_rule

_HEAD = "model.mtp_layers"  # what the head's tensors are called, in the model's own checkpoint


class MiMo(Llama):
    """The model itself, without its head."""

    unused_tensors: ClassVar[tuple[str, ...]] = (rf"{re.escape(_HEAD)}\..*",)


class MiMoMTP(nnx.Module):
    """One decoder layer over a token's embedding beside the hidden state before it (Xiaomi, 2025; DeepSeek-AI, 2024).

    Trained to guess one token; for more it runs again on what it gave itself. Embedding and head are the model's own.
    As in vLLM and SGLang the first position sees no embedding.

    # position p reads   final hidden state of p | token p + 1
    #            gives   a hidden state, whose logits are of token p + 2
    """

    unused_tensors: ClassVar[tuple[str, ...]] = (rf"(?!{re.escape(_HEAD)}\.).*",)

    def __init__(self, config: HeadConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        norm = partial(RMSNorm, config.hidden_size, epsilon=config.norm_epsilon, numerics=numerics)
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size, numerics=numerics)
        self.token_norm = norm()
        self.hidden_norm = norm()
        self.projection = Linear(2 * config.hidden_size, (config.hidden_size,), axes=(None, None), numerics=numerics)
        self.layers = nnx.List([DecoderLayer(config, numerics=numerics, backend=backend)])
        self.norm = norm()
        self.head = Embedding(config.padded_vocab_size, config.hidden_size, numerics=numerics)
        self.rope = config.rope

    def combine(self, features: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        return features

    def advance(
        self,
        token_ids: Int[Array, " tokens"],
        states: Float[Array, "tokens hidden"],
        positions: Int[Array, " tokens"],
        caches: Sequence[LayerCache],
        inputs: StepInputs,
    ) -> tuple[Float[Array, "tokens hidden"], list[LayerCache]]:
        angles = jax.lax.optimization_barrier(rotation(self.rope, positions))
        embedded = jnp.where(positions[:, None] == 0, 0, self.embedding(token_ids))
        both = jnp.concatenate([self.hidden_norm(states), self.token_norm(embedded)], axis=-1)
        x = self.projection(both, num_tokens=inputs.num_tokens)
        xs, written = apply_layers(self.layers, x, caches, angles, inputs)
        return self.norm(xs[-1]), written

    def logits(
        self, states: Float[Array, "rows hidden"], num_rows: Int[Array, ""] | None = None
    ) -> Float[Array, "rows vocab"]:
        return self.head.logits(states, num_rows)

    @staticmethod
    def weight_rules(config: HeadConfig) -> list[WeightRule]:
        hidden, theirs = config.hidden_size, f"{_HEAD}.0"
        return [
            plain_rule("token_norm.weight", f"{theirs}.token_layernorm.weight", (hidden,)),
            plain_rule("hidden_norm.weight", f"{theirs}.hidden_layernorm.weight", (hidden,)),
            plain_rule("projection.weight", f"{theirs}.input_proj.weight", (hidden, 2 * hidden)),
            plain_rule("norm.weight", f"{theirs}.final_layernorm.weight", (hidden,)),
            *layer_rules(config, "layers.0", theirs),
        ]

    @staticmethod
    def head_prefixes(config: HeadConfig) -> tuple[str, ...]:
        return ("head.",)
