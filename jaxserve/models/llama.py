"""The Llama family: Llama 2, 3 and 3.x, Mistral, SmolLM2, and whatever shares their layers."""

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
from jaxserve.layers.attention import Attention, AttentionBackend, AttentionShape, StepInputs
from jaxserve.layers.linear import Embedding
from jaxserve.layers.mlp import GatedMLP
from jaxserve.layers.norm import RMSNorm
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.rope import Rotation, rotation
from jaxserve.layers.stack import apply_layers
from jaxserve.models.base import DecoderConfig, WeightRule


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        norm = partial(RMSNorm, config.hidden_size, epsilon=config.norm_epsilon, numerics=numerics)
        self.attention_norm = norm()
        self.attention = Attention(
            AttentionShape(
                hidden_size=config.hidden_size,
                num_q_heads=config.num_q_heads,
                num_kv_heads=config.num_cached_kv_heads,
                head_dim=config.head_dim,
            ),
            numerics=numerics,
            backend=backend,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            sliding_window=config.sliding_window,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.ffn_size,
            numerics=numerics,
            num_shards=config.num_shards,
            bias=config.mlp_bias,
        )

    def __call__(
        self, x: Float[Array, "tokens hidden"], cache: LayerCache, angles: Rotation, inputs: StepInputs
    ) -> tuple[Float[Array, "tokens hidden"], LayerCache]:
        x, cache = self.attention(x, cache, angles, inputs, residual=x, norm=self.attention_norm)
        return self.mlp(x, norm=self.mlp_norm, num_tokens=inputs.num_tokens), cache


class Llama(nnx.Module):
    """Embedding, decoder layers, final norm, head."""

    unused_tensors: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: DecoderConfig, *, numerics: Numerics, backend: AttentionBackend) -> None:
        self.embedding = Embedding(config.padded_vocab_size, config.hidden_size, numerics=numerics)
        self.layers = nnx.List(
            DecoderLayer(config, numerics=numerics, backend=backend) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, numerics=numerics)
        tied = config.tie_embeddings
        self.head = None if tied else Embedding(config.padded_vocab_size, config.hidden_size, numerics=numerics)
        self.rope = config.rope
        self.feature_layers = config.feature_layers

    def hidden_states(
        self,
        token_ids: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        caches: Sequence[LayerCache],
        inputs: StepInputs,
    ) -> tuple[Float[Array, "tokens hidden"], Float[Array, "tokens features"] | None, list[LayerCache]]:
        angles = jax.lax.optimization_barrier(rotation(self.rope, positions))  # once, not in each layer again
        xs, written = apply_layers(self.layers, self.embedding(token_ids), caches, angles, inputs)
        read = [xs[index] for index in self.feature_layers]
        return self.norm(xs[-1]), jnp.concatenate(read, axis=-1) if read else None, written

    def logits(
        self, hidden: Float[Array, "rows hidden"], num_rows: Int[Array, ""] | None = None
    ) -> Float[Array, "rows vocab"]:
        return (self.head or self.embedding).logits(hidden, num_rows)

    @staticmethod
    def weight_rules(config: DecoderConfig) -> list[WeightRule]:
        rules = [
            vocabulary_rule(config, "embedding.weight", "model.embed_tokens.weight"),
            plain_rule("norm.weight", "model.norm.weight", (config.hidden_size,)),
        ]
        if not config.tie_embeddings:
            rules.append(vocabulary_rule(config, "head.weight", "lm_head.weight"))
        for index in range(config.num_layers):
            rules += layer_rules(config, f"layers.{index}", f"model.layers.{index}")
        return rules

    @staticmethod
    def head_prefixes(config: DecoderConfig) -> tuple[str, ...]:
        return ("embedding." if config.tie_embeddings else "head.",)


def plain_rule(param: str, source: str, shape: tuple[int, ...]) -> WeightRule:
    """A parameter that is a tensor as it stands."""
    return WeightRule(param=param, sources=(source,), shapes=(shape,), param_shape=shape)


def vocabulary_rule(config: DecoderConfig, param: str, source: str) -> WeightRule:
    """An embedding or a head over the whole vocabulary, padded so that devices get equal parts."""
    rule = plain_rule(param, source, (config.vocab_size, config.hidden_size))

    def part(rows: range) -> WeightRule:
        known = range(min(rows.start, config.vocab_size), min(rows.stop, config.vocab_size))

        def assemble(tensors: Sequence[np.ndarray]) -> np.ndarray:
            (tensor,) = tensors
            if len(known) == len(rows):
                return tensor
            padded = np.zeros((len(rows), config.hidden_size), tensor.dtype)
            padded[: len(known)] = tensor
            return padded

        return replace(rule, rows=(known,), param_shape=(len(rows), config.hidden_size), assemble=assemble)

    return replace(part(range(config.padded_vocab_size)), rows=None, part=part)


def layer_rules(
    config: DecoderConfig, ours: str, theirs: str, *, qkv_in_features: int | None = None
) -> list[WeightRule]:
    """A decoder layer's parameters; q, k and v are made of so many features, hidden_size where that is None."""
    hidden, q_features = config.hidden_size, config.num_q_heads * config.head_dim
    rules = [
        plain_rule(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (hidden,)),
        plain_rule(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", (hidden,)),
        plain_rule(f"{ours}.attention.out.weight", f"{theirs}.self_attn.o_proj.weight", (hidden, q_features)),
        plain_rule(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight", (hidden, config.ffn_size)),
        _qkv_rule(config, f"{ours}.attention.qkv", f"{theirs}.self_attn", "weight", (qkv_in_features or hidden,)),
        _gate_up_rule(config, f"{ours}.mlp.gate_up", f"{theirs}.mlp", "weight", (hidden,)),
    ]
    if config.attention_out_bias:
        rules.append(plain_rule(f"{ours}.attention.out.bias", f"{theirs}.self_attn.o_proj.bias", (hidden,)))
    if config.attention_bias:
        rules.append(_qkv_rule(config, f"{ours}.attention.qkv", f"{theirs}.self_attn", "bias", ()))
    if config.mlp_bias:
        rules.append(plain_rule(f"{ours}.mlp.down.bias", f"{theirs}.mlp.down_proj.bias", (hidden,)))
        rules.append(_gate_up_rule(config, f"{ours}.mlp.gate_up", f"{theirs}.mlp", "bias", ()))
    return rules


def _qkv_rule(config: DecoderConfig, ours: str, theirs: str, part: str, tail: tuple[int, ...]) -> WeightRule:
    """Each KV head with its query heads; where devices outnumber KV heads, each copy of one with a part of them."""
    kv_heads, head_dim, copies = config.num_cached_kv_heads, config.head_dim, config.kv_head_copies
    group = config.num_q_heads // kv_heads
    q_shape, kv_shape = (config.num_q_heads * head_dim, *tail), (config.num_kv_heads * head_dim, *tail)

    def assemble(tensors: Sequence[np.ndarray]) -> np.ndarray:
        q = tensors[0].reshape(-1, group, head_dim, *tail)
        k, v = (np.repeat(tensor.reshape(-1, 1, head_dim, *tail), copies, axis=0) for tensor in tensors[1:])
        return np.concatenate([q, k, v], axis=1)

    def of_heads(heads: range) -> WeightRule | None:
        if heads.start % copies or heads.stop % copies:
            return None
        q_rows = range(heads.start * group * head_dim, heads.stop * group * head_dim)
        kv_rows = range(heads.start // copies * head_dim, heads.stop // copies * head_dim)
        shape = (len(heads), *rule.param_shape[1:])
        return replace(rule, rows=(q_rows, kv_rows, kv_rows), param_shape=shape, part=None)

    rule = WeightRule(
        param=f"{ours}.{part}",
        sources=tuple(f"{theirs}.{name}_proj.{part}" for name in "qkv"),
        shapes=(q_shape, kv_shape, kv_shape),
        param_shape=(kv_heads, group + 2, head_dim, *tail),
        assemble=assemble,
        part=of_heads,
    )
    return rule


def _gate_up_rule(config: DecoderConfig, ours: str, theirs: str, part: str, tail: tuple[int, ...]) -> WeightRule:
    shard_size = config.ffn_size // config.num_shards

    def assemble(tensors: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([tensor.reshape(-1, shard_size, *tail) for tensor in tensors], axis=1)

    def of_shards(shards: range) -> WeightRule:
        rows = range(shards.start * shard_size, shards.stop * shard_size)
        return replace(rule, rows=(rows, rows), param_shape=(len(shards), *rule.param_shape[1:]), part=None)

    shape = (config.ffn_size, *tail)
    rule = WeightRule(
        param=f"{ours}.{part}",
        sources=(f"{theirs}.gate_proj.{part}", f"{theirs}.up_proj.{part}"),
        shapes=(shape, shape),
        param_shape=(config.num_shards, 2, shard_size, *tail),
        assemble=assemble,
        part=of_shards,
    )
    return rule
