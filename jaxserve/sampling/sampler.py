"""Logits to tokens, on the device: pure functions that the runner's step calls under jit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.parallel.shards import WHOLE, Shards
from jaxserve.sampling.draw import draw
from jaxserve.sampling.inputs import Leaf, SamplingInputs, Variant
from jaxserve.sampling.logit_rules import apply_rules
from jaxserve.sampling.logprobs import score
from jaxserve.sampling.vocabulary import Vocabulary


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_ids", "ok", "model_ok", "logprobs", "ranks", "top_token_ids", "top_logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SampledTokens:
    """A step's tokens. All but the first three are None unless the variant is "full"."""

    token_ids: Leaf  # i32[rows], 0 where not ok
    ok: Leaf  # bool[rows], False where the logits are not finite or no token is left to choose
    model_ok: Leaf  # bool[rows], False where it is the model's own logits that are not finite
    logprobs: Leaf | None = None  # f32[rows], of the token, from the raw logits
    ranks: Leaf | None = None  # i32[rows], 1 is the most likely token
    top_token_ids: Leaf | None = None  # i32[rows, MAX_LOGPROBS], most likely first
    top_logprobs: Leaf | None = None  # f32[rows, MAX_LOGPROBS]


def sample(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    variant: Variant,
    *,
    history: Int[Array, "rows positions"] | None = None,
    vocab_size: int | None = None,
    shards: Shards = WHOLE,
) -> SampledTokens:
    """Choose one token a row. `history` (prompt and output, below `inputs.num_tokens`) is for "full" alone.

    Order: logprobs of the raw logits; allowed tokens, bias, bad words, min_tokens, penalties; then the argmax for
    rows of temperature 0, and temperature, min_p, top_k, top_p for the others.

    Logits from `vocab_size` on are padding. With `shards` they are one device's part of the vocabulary, `history` and
    `inputs` are whole, and every device comes to the same tokens: those of logits in one piece.
    """
    vocabulary_of = partial(Vocabulary.of, size=vocab_size, shards=shards)
    logits = logits.astype(jnp.float32)
    raw = vocabulary_of(logits)
    if variant != "full":
        token_ids = raw.argmax() if variant == "greedy" else draw(raw, inputs)
        return SampledTokens(jnp.where(raw.is_finite, token_ids, 0), raw.is_finite, raw.is_finite)
    if inputs.rules is None or history is None:
        raise ValueError('the variant "full" needs inputs.rules and history')
    ruled = vocabulary_of(apply_rules(logits, inputs, inputs.rules, history, shards))
    ok = raw.is_finite & ruled.is_finite
    return _scored(raw, jnp.where(ok, draw(ruled, inputs), 0), ok)


def prompt_logprobs(
    logits: Float[Array, "rows vocab"],
    target_ids: Int[Array, " rows"],
    *,
    vocab_size: int | None = None,
    shards: Shards = WHOLE,
) -> SampledTokens:
    """The scores of known next tokens: the same fields as a sampled token's; see `sample` for the vocabulary."""
    vocabulary = Vocabulary.of(logits.astype(jnp.float32), size=vocab_size, shards=shards)
    return _scored(vocabulary, target_ids, vocabulary.is_finite)


def _scored(vocabulary: Vocabulary, token_ids: Int[Array, " rows"], ok: Array) -> SampledTokens:
    scores = score(vocabulary, token_ids)
    alternatives = scores.top_token_ids, scores.top_logprobs
    return SampledTokens(token_ids, ok, vocabulary.is_finite, scores.logprobs, scores.ranks, *alternatives)
