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
    mass = jnp.exp(vocabulary.blocks - largest[:, :, None]).sum(axis=-1).sum(axis=-1)
    log_mass = jnp.log(mass)
    rows = token_ids.shape[0]
    chosen = jnp.take_along_axis(vocabulary.blocks.reshape(rows, -1), token_ids[:, None], axis=-1, mode="clip")
    ranks = 1 + (vocabulary.blocks > chosen[:, :, None]).sum(axis=(-1, -2), dtype=jnp.int32)
    top, top_token_ids = vocabulary.top(MAX_LOGPROBS)
    return Scores(
        logprobs=(chosen - largest)[:, 0] - log_mass,
        ranks=ranks,
        top_token_ids=top_token_ids,
        top_logprobs=top - largest - log_mass[:, None],
    )
