"""Log-probabilities of given tokens, their ranks and the best alternatives, from raw logits."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.sampling.vocabulary import Vocabulary
from jaxserve.sampling_params import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class Scores:
    """What `SampledTokens` says about the distribution a token came from."""

    logprobs: Float[Array, " rows"]
    ranks: Int[Array, " rows"]
    top_token_ids: Int[Array, "rows alternatives"]
    top_logprobs: Float[Array, "rows alternatives"]


def score(vocabulary: Vocabulary, token_ids: Int[Array, " rows"]) -> Scores:
    """Natural logarithms; rank 1 is the most likely token, and tokens that tie share the better rank."""
    largest = vocabulary.max[:, None]
    logits = vocabulary.blocks.reshape(token_ids.shape[0], -1)  # [rows, local_vocab]
    place = token_ids[:, None] - vocabulary.first_token
    is_mine = (place >= 0) & (place < logits.shape[1])
    chosen = vocabulary.shards.from_owner(jnp.take_along_axis(logits, place, axis=-1, mode="clip"), is_mine)
    sums = jnp.exp(vocabulary.blocks - largest[:, :, None]).sum(axis=-1)
    log_mass = jnp.log(vocabulary.gather(sums).sum(axis=-1))
    ranks = 1 + vocabulary.shards.sum((logits > chosen).sum(axis=-1, dtype=jnp.int32))
    top, top_token_ids = vocabulary.top(MAX_LOGPROBS)
    return Scores(
        logprobs=(chosen - largest)[:, 0] - log_mass,
        ranks=ranks,
        top_token_ids=top_token_ids,
        top_logprobs=top - largest - log_mass[:, None],
    )
