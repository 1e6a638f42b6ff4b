"""Changes to the logits before a token is chosen: allowed tokens, logit bias, bad words, min_tokens, penalties."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.parallel.shards import WHOLE, Shards
from jaxserve.sampling.inputs import ANY_TOKEN, MASK_BITS, NO_TOKEN, LogitRules, SamplingInputs

HISTORY_CHUNK = 512  # tokens of history counted at a time, so that short texts do not pay for the longest


def apply_rules(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    rules: LogitRules,
    history: Int[Array, "rows positions"],
    shards: Shards = WHOLE,
) -> Float[Array, "rows vocab"]:
    """All of them, each only if some row asks for it; rows that do not ask keep their logits bit for bit.

    `logits` may be one device's part of a vocabulary: what changes lies on one device, and nothing is sent.
    """
    first_token = shards.index * logits.shape[1]
    masks_stop_ids = inputs.position < inputs.min_tokens
    edits = inputs.has_edits | masks_stop_ids
    penalises = (inputs.repetition_penalty != 1) | (inputs.frequency_penalty != 0) | (inputs.presence_penalty != 0)
    steps = (
        (inputs.has_allowed, lambda given: _allow_only(given, inputs, rules, first_token)),
        (edits, lambda given: _edit(given, inputs, rules, history, masks_stop_ids, first_token)),
        (penalises, lambda given: _penalise(given, inputs, history, first_token)),
    )
    for asked, change in steps:
        logits = lax.cond(asked.any(), change, lambda given: given, logits)
    return logits


def _allow_only(
    logits: Float[Array, "rows vocab"], inputs: SamplingInputs, rules: LogitRules, first_token: Int[Array, ""] | int
) -> Float[Array, "rows vocab"]:
    rows, width = logits.shape
    num_words = -(-width // MASK_BITS)
    words = jnp.pad(jnp.asarray(rules.allowed), ((0, 0), (0, num_words)))  # room for a last part of padding alone
    words = lax.dynamic_slice_in_dim(words, first_token // MASK_BITS, num_words, axis=1)
    bits = words[:, :, None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32)
    allowed = (bits & 1).astype(bool).reshape(rows, -1)[:, :width]
    return jnp.where(allowed | ~inputs.has_allowed[:, None], logits, -jnp.inf)


def _edit(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    rules: LogitRules,
    history: Int[Array, "rows positions"],
    masks_stop_ids: Bool[Array, " rows"],
    first_token: Int[Array, ""] | int,
) -> Float[Array, "rows vocab"]:
    """Biases, and -inf for what a bad word or min_tokens forbids, added to single tokens in one scatter."""
    banned = _completing_tokens(jnp.asarray(rules.bad_words), inputs, history)
    stops = jnp.where(masks_stop_ids[:, None], jnp.asarray(rules.stop_ids), NO_TOKEN)
    token_ids = jnp.concatenate([jnp.asarray(rules.bias_ids), banned, stops], axis=-1)
    values = jnp.full(token_ids.shape, -jnp.inf, jnp.float32).at[:, : rules.bias_values.shape[1]].set(rules.bias_values)
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, _places(token_ids, first_token)].add(values, mode="drop")


def _places(token_ids: Int[Array, ...], first_token: Int[Array, ""] | int) -> Int[Array, ...]:
    """Where tokens lie among logits that begin with `first_token`; NO_TOKEN, which is nowhere, for those before."""
    return jnp.where(token_ids >= first_token, token_ids - first_token, NO_TOKEN)


def _completing_tokens(
    bad_words: Int[Array, "rows words length"], inputs: SamplingInputs, history: Int[Array, "rows positions"]
) -> Int[Array, "rows words"]:
    """The last token of each bad word whose other tokens the output ends with; NO_TOKEN for the rest.

    # output     ... 7 5 9
    # bad word   ANY ANY 5 9 | 4      -> 4
    #            prefix      | last
    """
    length = bad_words.shape[-1] - 1
    positions = inputs.num_tokens[:, None] - length + jnp.arange(length)
    tail = jnp.take_along_axis(history, jnp.maximum(positions, 0), axis=-1, mode="clip")
    tail = jnp.where(positions >= inputs.num_prompt_tokens[:, None], tail, NO_TOKEN)  # the output alone counts
    prefix = bad_words[:, :, :-1]
    matches = ((prefix == ANY_TOKEN) | (prefix == tail[:, None])).all(axis=-1)
    return jnp.where(matches, bad_words[:, :, -1], NO_TOKEN)


def _penalise(
    logits: Float[Array, "rows vocab"],
    inputs: SamplingInputs,
    history: Int[Array, "rows positions"],
    first_token: Int[Array, ""] | int,
) -> Float[Array, "rows vocab"]:
    """Repetition over prompt and output, frequency and presence over the output."""
    count = partial(_count, history, first_token=first_token, vocab_size=logits.shape[1])
    num_generated = count(inputs.num_prompt_tokens, inputs.num_tokens)
    repetition = inputs.repetition_penalty[:, None]

    def repeat() -> Float[Array, "rows vocab"]:
        in_prompt = count(jnp.zeros_like(inputs.num_tokens), inputs.num_prompt_tokens)
        scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
        return jnp.where((num_generated > 0) | (in_prompt > 0), scaled, logits)

    logits = lax.cond((repetition != 1).any(), repeat, lambda: logits)
    logits -= inputs.frequency_penalty[:, None] * num_generated
    return logits - inputs.presence_penalty[:, None] * (num_generated > 0)


def _count(
    history: Int[Array, "rows positions"],
    starts: Int[Array, " rows"],
    ends: Int[Array, " rows"],
    *,
    first_token: Int[Array, ""] | int,
    vocab_size: int,
) -> Int[Array, "rows vocab"]:
    """How often each token stands in positions [start, end) of its row."""
    rows, max_positions = history.shape
    size = min(HISTORY_CHUNK, max_positions)
    row = jnp.arange(rows)[:, None]

    def count_chunk(index: Int[Array, ""], counts: Int[Array, "rows vocab"]) -> Int[Array, "rows vocab"]:
        first = index * size
        begin = jnp.minimum(first, max_positions - size)  # the last chunk overlaps the one before
        positions = begin + jnp.arange(size)
        counted = (positions >= first) & (positions >= starts[:, None]) & (positions < ends[:, None])
        chunk = lax.dynamic_slice_in_dim(history, begin, size, axis=1)
        return counts.at[row, jnp.where(counted, _places(chunk, first_token), NO_TOKEN)].add(1, mode="drop")

    num_chunks = -(-ends.max() // size)
    return lax.fori_loop(starts.min() // size, num_chunks, count_chunk, jnp.zeros((rows, vocab_size), jnp.int32))
