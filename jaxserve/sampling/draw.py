"""Draws one token a row under temperature, min_p, top_k and top_p; a row's choice depends on that row alone."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxserve.sampling.inputs import SamplingInputs
from jaxserve.sampling.random_numbers import uniforms
from jaxserve.sampling.vocabulary import BLOCK_TOKENS, Vocabulary, first_true

MAX_CANDIDATES = 64  # the largest top_k that is served from the best few tokens alone


def draw(vocabulary: Vocabulary, inputs: SamplingInputs) -> Int[Array, " rows"]:
    """A token a row; greedy rows get the argmax.

    A row with top_k up to `MAX_CANDIDATES` is drawn from its best few. Any other row is drawn from the whole
    vocabulary, block first, and top_p holds by rejection: a token with too much mass before it is refused, and so is
    all behind it. Work that no row needs is not done, but its being done changes nothing in another row.
    """
    greedy = vocabulary.argmax()
    draws = (inputs.temperature > 0) & vocabulary.is_finite
    few = draws & (inputs.top_k > 0) & (inputs.top_k <= MAX_CANDIDATES)
    from_few = lax.cond(few.any(), lambda: _draw_from_few(vocabulary, inputs), lambda: greedy)
    rest = draws & ~few
    from_all = lax.cond(rest.any(), lambda: _draw_from_all(vocabulary, inputs, rest, greedy), lambda: greedy)
    return jnp.where(few, from_few, jnp.where(rest, from_all, greedy))


def _pick(weights: Float[Array, "rows n"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    """An index with probability weights / sum(weights), never one of weight 0 unless all are."""
    return _first_beyond(jnp.cumsum(weights, axis=-1), weights, jnp.zeros_like(uniform), uniform)


def _first_beyond(
    sums: Float[Array, "rows n"],
    weights: Float[Array, "rows n"],
    start: Float[Array, " rows"],
    uniform: Float[Array, " rows"],
) -> Int[Array, " rows"]:
    """The index at the fraction `uniform` of the way from `start` to the end of the running sums of `weights`."""
    wanted = start + uniform * (sums[:, -1] - start)
    # The parallel sum may round so that it steps where a weight is 0, or stays short of its end: look at both.
    holds = (sums > wanted[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - first_true(weights[:, ::-1] > 0)
    return jnp.where(holds.any(axis=-1), first_true(holds), last)


def _logit_floor(vocabulary: Vocabulary, inputs: SamplingInputs) -> Float[Array, " rows"]:
    """min_p as a logit: exp((logit - max) / temperature) >= min_p; -inf where min_p is 0."""
    return vocabulary.max + inputs.temperature * jnp.log(inputs.min_p)


def _inverse_temperature(inputs: SamplingInputs) -> Float[Array, " rows"]:
    return 1 / jnp.where(inputs.temperature > 0, inputs.temperature, 1)


def _draw_from_few(vocabulary: Vocabulary, inputs: SamplingInputs) -> Int[Array, " rows"]:
    """Rows with top_k <= MAX_CANDIDATES: everything is decided among the best tokens.

    They are taken least likely first: float32 tells small sums apart best, and the random numbers are finest near 0.
    """
    logits, token_ids = (best_first[:, ::-1] for best_first in vocabulary.top(MAX_CANDIDATES))
    ranks = jnp.arange(logits.shape[-1])[::-1]
    keep = (ranks < inputs.top_k[:, None]) & (logits >= _logit_floor(vocabulary, inputs)[:, None])
    scaled = (logits - vocabulary.max[:, None]) * _inverse_temperature(inputs)[:, None]
    weights = jnp.where(keep, jnp.exp(scaled), 0)
    sums = jnp.cumsum(weights, axis=-1)
    mass, top_p = sums[:, -1:], inputs.top_p[:, None]
    keep = (mass - sums < top_p * mass) | (top_p >= 1) | (ranks == 0)
    dropped = jnp.where(keep, 0, sums).max(axis=-1)
    picked = _first_beyond(sums, weights, dropped, uniforms(inputs.seed, inputs.position, 0)[0])
    return jnp.take_along_axis(token_ids, picked[:, None], axis=-1, mode="clip")[:, 0]


def _draw_from_all(
    vocabulary: Vocabulary,
    inputs: SamplingInputs,
    draws: Bool[Array, " rows"],
    greedy: Int[Array, " rows"],
) -> Int[Array, " rows"]:
    """Rows without a small top_k. One pass over the vocabulary, or with top_p < 1 one a draw and one more.

    A draw leaves the mass before the drawn token, a uniform part of what was left, until that is below top_p: about
    1 + ln(1 / top_p) draws on average. The row that needs most decides. `_kth_largest` adds its own passes.
    """
    ranked = draws & (inputs.top_k > MAX_CANDIDATES) & (inputs.top_k < vocabulary.size)
    floor = _logit_floor(vocabulary, inputs)
    kth = lax.cond(ranked.any(), lambda: _kth_largest(vocabulary, inputs.top_k, ranked), lambda: floor)
    floor = jnp.where(ranked, jnp.maximum(floor, kth), floor)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return ~state[1].all()

    def draw_again(state: _State) -> _State:
        attempt, accepted, wanted, token_id, logit = state
        # Tied to the round: XLA would else keep arrays of the vocabulary's size between rounds, and most have one.
        row, _ = lax.optimization_barrier(((floor, vocabulary.max, _inverse_temperature(inputs)), attempt))
        tokens = _Remaining(vocabulary, *row)
        sums = tokens.block_sums(_Pivot(token_id, logit))
        mass = sums.sum(axis=-1)  # before the last draw; in the first round, of all tokens
        is_first = attempt == 0
        accepted |= ~is_first & ((mass < wanted) | (mass == 0))
        wanted = jnp.where(is_first, inputs.top_p * mass, wanted)
        drawn = tokens.draw(sums, _Pivot(token_id, logit), uniforms(inputs.seed, inputs.position, attempt))
        alone = wanted <= 1  # the best token weighs exp(0): it is all that top_p keeps
        token_id = jnp.where(accepted, token_id, jnp.where(alone, greedy, drawn.token_id))
        logit = jnp.where(accepted, logit, drawn.logit)
        return attempt + 1, accepted | alone | (inputs.top_p >= 1), wanted, token_id, logit

    # Every round leaves a row fewer tokens, and the best has no mass before it, so the loop ends.
    last = _Pivot.behind_all(vocabulary)
    state = (jnp.int32(0), ~draws, jnp.zeros_like(last.logit), last.token_id, last.logit)
    return lax.while_loop(unfinished, draw_again, state)[3]


_State = tuple[Array, Array, Array, Array, Array]  # attempt, and a row: accepted, mass wanted, drawn token, its logit


@dataclass(frozen=True, slots=True)
class _Pivot:
    """A token a row; "before" it are those with a larger logit, or an equal one and a lower id."""

    token_id: Int[Array, " rows"]
    logit: Float[Array, " rows"]

    @classmethod
    def behind_all(cls, vocabulary: Vocabulary) -> _Pivot:
        """The place behind all tokens."""
        rows = vocabulary.max.shape[0]
        return cls(jnp.full(rows, vocabulary.size, jnp.int32), jnp.full(rows, -jnp.inf, jnp.float32))


@dataclass(frozen=True, slots=True)
class _Remaining:
    """The tokens whose logit reaches the row's floor, each of weight exp((logit - max) / temperature)."""

    vocabulary: Vocabulary
    floor: Float[Array, " rows"]
    max: Float[Array, " rows"]
    inverse_temperature: Float[Array, " rows"]

    def weights(
        self, logits: Float[Array, "rows n block"], token_ids: Int[Array, "_ n block"], before: _Pivot
    ) -> Float[Array, "rows n block"]:
        """Weights of the tokens before the pivot, 0 of all others."""
        floor, largest, scale = (a[:, None, None] for a in (self.floor, self.max, self.inverse_temperature))
        pivot_id, pivot = before.token_id[:, None, None], before.logit[:, None, None]
        keep = (logits >= floor) & ((logits > pivot) | ((logits == pivot) & (token_ids < pivot_id)))
        return jnp.where(keep, jnp.exp((logits - largest) * scale), 0)

    def block_sums(self, before: _Pivot) -> Float[Array, "rows blocks"]:
        """The weight of each block."""
        local = self.weights(self.vocabulary.blocks, self.vocabulary.token_ids, before).sum(axis=-1)
        return self.vocabulary.gather(local)

    def draw(self, sums: Float[Array, "rows blocks"], before: _Pivot, uniform: tuple[Array, Array]) -> _Pivot:
        """A block by its weight, then a token of it by its own."""
        block = _pick(sums, uniform[0])
        logits = self.vocabulary.block(block)
        token_ids = block[:, None] * BLOCK_TOKENS + jnp.arange(BLOCK_TOKENS)
        weights = self.weights(logits[:, None], token_ids[:, None], before)[:, 0]
        within = _pick(weights, uniform[1])
        logit = jnp.take_along_axis(logits, within[:, None], axis=-1, mode="clip")[:, 0]
        return _Pivot(block * BLOCK_TOKENS + within, logit)


def _kth_largest(vocabulary: Vocabulary, k: Int[Array, " rows"], wanted: Bool[Array, " rows"]) -> Float[Array, " rows"]:
    """What parts each wanted row's best k tokens from the rest, found bit by bit in up to 32 passes.

    A row is done when k tokens reach its number; more passes would move the number and keep the same tokens. Only
    tokens that tie with the k-th are kept beyond k.
    """

    def unfinished(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        bit, _, separated = state
        return (bit >= 0) & ~separated.all()

    def set_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, found, separated = state
        guess = found | (jnp.uint32(1) << bit.astype(jnp.uint32))
        reach = vocabulary.blocks >= _from_ordered(guess)[:, None, None]
        count = vocabulary.shards.sum(reach.sum(axis=(-1, -2), dtype=jnp.int32))
        return bit - 1, jnp.where(count >= k, guess, found), separated | (count == k)

    state = (jnp.int32(31), jnp.zeros(k.shape, jnp.uint32), ~wanted)
    return _from_ordered(lax.while_loop(unfinished, set_bit, state)[1])


_SIGN = np.uint32(1 << 31)
_LOWEST = np.uint32(0x007FFFFF)  # -inf; what is below would be a NaN


def _from_ordered(ordered: UInt32[Array, " rows"]) -> Float[Array, " rows"]:
    """Floats in the order of the integers: 0 ... _LOWEST is -inf, then negative, positive, +inf, NaN."""
    ordered = jnp.maximum(ordered, _LOWEST)
    bits = jnp.where(ordered >= _SIGN, ordered ^ _SIGN, ~ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)
