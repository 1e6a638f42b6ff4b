"""What every draft head offers: `HeadConfig`, and `DraftHead`, a layer that guesses on from a model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import jax

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.layers.attention import AttentionBackend, StepInputs
from jaxserve.layers.numerics import Numerics
from jaxserve.models.base import DecoderConfig, WeightRule


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(DecoderConfig):
    """Sizes of a head, which is a decoder of few layers, and of what it reads. `vocab_size` is the model's."""

    num_features: int  # width of what it reads of the model, a token
    draft_vocab_size: int  # tokens it can guess
    layer_prefix: str = ""  # what the checkpoint calls its layer
    norm_before_residual: bool = False  # whether the residual stream begins behind the norm of the hidden state
    has_embedding: bool = False  # of its own; else the model's
    has_head: bool = False
    has_token_map: bool = False  # from its own vocabulary to the model's

    @property
    def padded_draft_vocab_size(self) -> int:
        """Rows of its head, equal parts for all devices."""
        return -(-self.draft_vocab_size // self.num_shards) * self.num_shards

    def parameters_of_model(self, model_head: str) -> dict[str, str]:
        """Name of a parameter that it shares with the model -> the model's name; `model_head` is the model's head."""
        shared = {} if self.has_embedding else {"embedding.weight": "embedding.weight"}
        return shared if self.has_head else shared | {"head.weight": model_head}


class DraftHead(Protocol):
    """A head, as the runner sees it. At position p it reads token p + 1, and its logits are of token p + 2."""

    unused_tensors: ClassVar[tuple[str, ...]]  # see `CausalLM`

    def __init__(self, config: HeadConfig, *, numerics: Numerics, backend: AttentionBackend) -> None: ...

    def combine(self, features: jax.Array) -> jax.Array:
        """States [tokens, hidden] of what the model gave at the same positions, [tokens, features]."""
        ...

    def advance(
        self,
        token_ids: jax.Array,
        states: jax.Array,
        positions: jax.Array,
        caches: Sequence[LayerCache],
        inputs: StepInputs,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """(states [tokens, hidden] behind these tokens, the caches with their K and V).

        Where the model has not been yet, a position's state is what this gave for the position before.
        """
        ...

    def logits(self, states: jax.Array, num_rows: jax.Array | None = None) -> jax.Array:
        """f32[rows, vocab] over the model's vocabulary, -inf for tokens that are not in the head's own; rows from
        `num_rows` on are padding."""
        ...

    @staticmethod
    def weight_rules(config: HeadConfig) -> list[WeightRule]:
        """See `CausalLM`; what it shares with the model is left out."""
        ...

    @staticmethod
    def head_prefixes(config: HeadConfig) -> tuple[str, ...]:
        """How the names of the parameters begin that `logits` reads."""
        ...
