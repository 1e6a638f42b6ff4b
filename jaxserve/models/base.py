"""What every model family offers: `DecoderConfig` read from config.json, `CausalLM`, and `WeightRule`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import numpy as np

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.checkpoint_values import CheckpointValues
from jaxserve.errors import CheckpointError
from jaxserve.layers.attention import AttentionBackend, StepInputs
from jaxserve.layers.numerics import Numerics
from jaxserve.layers.rope import RopeConfig


def _only_one(tensors: Sequence[np.ndarray]) -> np.ndarray:
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """How one of our parameters is made of a checkpoint's tensors.

    `param` is the parameter's dotted path, `sources` the tensor names, `shapes` the shape each must have, `assemble`
    turns them (in order, in the checkpoint's dtype) into an array of `param_shape`, which is cast to the model's dtype
    or to the parameter's own.

    Where some of the parameter's first axis is made of some rows of the sources, `part` gives the rule for that: it
    reads `rows` of each, and has the part's `param_shape`. It gives None for a part that does not come out whole.
    """

    param: str
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    param_shape: tuple[int, ...]
    assemble: Callable[[Sequence[np.ndarray]], np.ndarray] = _only_one
    rows: tuple[range, ...] | None = None  # of each source; None: all
    part: Callable[[range], WeightRule | None] | None = None
    dtype: np.dtype | None = None  # of a parameter that is no weight; None: the model's


# Qwen2's layers, as these have them: q, k and v have a bias, whatever config.json says, and what follows has none.
_QKV_BIAS_ALONE = ("MiMoForCausalLM",)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder-only transformer, from `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    num_shards: int = 1  # devices that share each layer: parts that fused projections are laid out in
    vocab_padding: int = 0  # rows of zeros behind the embedding and the head, so that devices get equal parts
    feature_layers: tuple[int, ...] = ()  # whose inputs a draft head reads; num_layers: what leaves the last one

    @property
    def kv_head_copies(self) -> int:
        """How many devices hold each KV head: more than one where there are more devices than heads."""
        return max(1, self.num_shards // self.num_kv_heads)

    @property
    def num_cached_kv_heads(self) -> int:
        """KV heads of the cache and of the fused projection, copies counted."""
        return self.num_kv_heads * self.kv_head_copies

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size + self.vocab_padding

    def can_split_over(self, num_shards: int) -> bool:
        """Whether so many devices can share each layer: whole query heads and equal feed-forward parts for all, and
        whole KV heads for each or whole groups of devices for each KV head."""
        shares_kv = self.num_kv_heads % num_shards == 0 or num_shards % self.num_kv_heads == 0
        return self.num_q_heads % num_shards == 0 and self.ffn_size % num_shards == 0 and shares_kv

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read `config.json`, old spellings and new; `CheckpointError` names a missing or impossible entry."""
        values = CheckpointValues(config)
        given = values.given()  # transformers writes null for what follows from other entries
        num_q_heads = values.positive_integer("num_attention_heads")
        hidden_size = values.positive_integer("hidden_size")
        num_kv_heads = given.positive_integer("num_key_value_heads", default=num_q_heads)
        head_dim = given.positive_integer("head_dim", default=max(1, hidden_size // num_q_heads))
        if head_dim % 2:
            raise CheckpointError(
                f"config.json: head_dim ({head_dim}) must be even: positions rotate pairs of channels"
            )
        if num_q_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({num_q_heads}) is no multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        if quantization := values.within("quantization_config").given().values:
            method = quantization.get("quant_method", "<no quant_method>")
            raise CheckpointError(
                f"config.json: quantization_config: safetensors quantised by {method!r:.80} are not supported; give "
                "the model without quantisation, or as a GGUF file"
            )
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
        max_positions = values.positive_integer("max_position_embeddings", default=2048)
        if max_positions < 2:
            raise values.wrong("max_position_embeddings", "at least 2, for a token of prompt and one of answer")
        architecture = next(iter(values.texts("architectures")), "<none>")
        attention_bias = values.flag("attention_bias")
        has_window = values.flag("use_sliding_window", default=True) and "sliding_window" in given.values
        return cls(
            architecture=architecture,
            vocab_size=values.positive_integer("vocab_size"),
            hidden_size=hidden_size,
            ffn_size=values.positive_integer("intermediate_size"),
            num_layers=values.positive_integer("num_hidden_layers"),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_epsilon=values.number("rms_norm_eps", default=1e-6),
            rope=RopeConfig.from_hf(config, head_dim),
            max_position_embeddings=max_positions,
            tie_embeddings=values.flag("tie_word_embeddings"),
            attention_bias=attention_bias or architecture in _QKV_BIAS_ALONE,
            attention_out_bias=attention_bias and architecture not in _QKV_BIAS_ALONE,
            mlp_bias=values.flag("mlp_bias"),
            sliding_window=values.positive_integer("sliding_window") if has_window else None,
        )


class CausalLM(Protocol):
    """A decoder-only language model, as the runner sees it. Built abstract; `weights` fills its parameters."""

    unused_tensors: ClassVar[tuple[str, ...]]  # patterns of a checkpoint's tensors that are for somebody else

    def __init__(self, config: DecoderConfig, *, numerics: Numerics, backend: AttentionBackend) -> None: ...

    def hidden_states(
        self, token_ids: jax.Array, positions: jax.Array, caches: Sequence[LayerCache], inputs: StepInputs
    ) -> tuple[jax.Array, jax.Array | None, list[LayerCache]]:
        """(final normalised hidden states [tokens, hidden], features, the caches with this step's K and V written).

        Features are what enters each of `config.feature_layers`, side by side: [tokens, layers x hidden]; None
        without.
        """
        ...

    def logits(self, hidden: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """f32[rows, vocab] of hidden states [rows, hidden]; those from `num_rows` on are padding."""
        ...

    @staticmethod
    def weight_rules(config: DecoderConfig) -> list[WeightRule]:
        """Every parameter's way out of a Hugging Face checkpoint."""
        ...

    @staticmethod
    def head_prefixes(config: DecoderConfig) -> tuple[str, ...]:
        """How the names of the parameters begin that `logits` reads."""
        ...
