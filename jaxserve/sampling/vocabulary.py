"""Logits seen in blocks of neighbouring token ids: argmax, the few best, and one block, without sorting them all."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.parallel.shards import WHOLE, Shards

BLOCK_TOKENS = 128  # a block; Llama's 128256, Qwen's 151936 and SmolLM's 49152 are multiples of it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One row's logits a row, in blocks, with the maximum of each block. Lives inside one trace; not a pytree.

    # token id    0 ....... 127 | 128 ..... 255 | ... | size - 1, then -inf up to a whole block
    # blocks[r]   [0, 0..127]   | [1, 0..127]   | ...

    Devices that share a vocabulary hold whole blocks each, side by side in order. A block is the same however it is
    split, and so is what is drawn. `blocks` and `block_max` are this device's; all else speaks of all tokens.
    """

    blocks: Float[Array, "rows local_blocks block"]
    block_max: Float[Array, "rows local_blocks"]
    max: Float[Array, " rows"]  # +inf where any logit is NaN
    best_ids: Int[Array, " rows"]
    size: int  # tokens, without the padding
    shards: Shards = WHOLE

    @classmethod
    def of(
        cls, logits: Float[Array, "rows local_vocab"], *, size: int | None = None, shards: Shards = WHOLE
    ) -> Vocabulary:
        """Cut float32 logits into blocks; those from token `size` on are padding, whatever they hold."""
        rows, width = logits.shape
        size = width if size is None else size
        if shards.count > 1 and width % BLOCK_TOKENS:
            raise ValueError(f"each part of a split vocabulary must be whole blocks of {BLOCK_TOKENS}, got {width}")
        if size < width * shards.count:
            logits = jnp.where(shards.index * width + jnp.arange(width) < size, logits, -jnp.inf)
        padding = -width % BLOCK_TOKENS
        if padding:
            logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        blocks = logits.reshape(rows, -1, BLOCK_TOKENS)
        # XLA:CPU's fast max passes over NaN; a sum never does, and costs less than looking for NaN.
        block_max = jnp.where(jnp.isnan(blocks.sum(axis=-1)), jnp.inf, blocks.max(axis=-1))
        return cls(blocks, block_max, *_best(blocks, block_max, shards), size, shards)

    @property
    def is_finite(self) -> Bool[Array, " rows"]:
        """Whether a token can be chosen: no NaN, no +inf, and not all -inf."""
        return jnp.isfinite(self.max)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold a token, on all devices together."""
        return -(-self.size // BLOCK_TOKENS)

    @property
    def first_token(self) -> Int[Array, ""] | int:
        """The id of this device's first token."""
        return self.shards.index * (self.blocks.shape[1] * BLOCK_TOKENS)

    @property
    def token_ids(self) -> Int[Array, "1 local_blocks block"]:
        """The token id of each place in `blocks`."""
        count = self.blocks.shape[1]
        places = jnp.arange(count * BLOCK_TOKENS, dtype=jnp.int32).reshape(1, count, BLOCK_TOKENS)
        return places + self.first_token

    def gather(self, values: Float[Array, "rows local_blocks"]) -> Float[Array, "rows blocks"]:
        """Each device's value of each of its blocks, of all blocks."""
        return self.shards.gather(values, axis=1)[:, : self.num_blocks]

    def block(self, index: Int[Array, " rows"]) -> Float[Array, "rows block"]:
        """The logits of one block a row."""
        count = self.blocks.shape[1]
        place = index - self.shards.index * count
        logits = jnp.take_along_axis(self.blocks, place[:, None, None], axis=1, mode="clip")[:, 0]
        return self.shards.from_owner(logits, ((place >= 0) & (place < count))[:, None])

    def argmax(self) -> Int[Array, " rows"]:
        """The best token, of equals the lowest id."""
        return self.best_ids

    def top(self, count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
        """The `count` best logits, best first, of equals the lowest id first, and their token ids."""
        count = min(count, self.size)
        values, places = _top_of_blocks(self.blocks, self.block_max, count)
        if self.shards.count == 1:
            return values, places
        # Devices come in the order of their tokens, and each one's equals in order: the first of equals has the lowest.
        values, token_ids = _gather_pairs(values, places + self.first_token, self.shards)
        best, places = _top_k(values, count)
        return best, jnp.take_along_axis(token_ids, places, axis=-1, mode="clip")


def first_true(mask: Bool[Array, "rows n"]) -> Int[Array, " rows"]:
    """The first place that holds, 0 where none does."""
    return jnp.argmax(mask, axis=-1).astype(jnp.int32)


def _best(
    blocks: Float[Array, "rows local_blocks block"], block_max: Float[Array, "rows local_blocks"], shards: Shards
) -> tuple[Float[Array, " rows"], Int[Array, " rows"]]:
    """The largest logit and its token, of equals the lowest id. (XLA:CPU's own argmax is ten times slower.)"""
    largest = block_max.max(axis=-1)
    block = first_true(block_max == largest[:, None])
    within = first_true(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0] == largest[:, None])
    token_ids = block * BLOCK_TOKENS + within
    if shards.count == 1:
        return largest, token_ids
    token_ids += shards.index * (blocks.shape[1] * BLOCK_TOKENS)
    values, token_ids = _gather_pairs(largest[:, None], token_ids[:, None], shards)
    largest = values.max(axis=-1)
    device = first_true(values == largest[:, None])
    return largest, jnp.take_along_axis(token_ids, device[:, None], axis=-1)[:, 0]


def _gather_pairs(
    values: Float[Array, "rows n"], token_ids: Int[Array, "rows n"], shards: Shards
) -> tuple[Float[Array, "rows all"], Int[Array, "rows all"]]:
    """All devices' values and tokens side by side, sent as one array."""
    pairs = jnp.stack([lax.bitcast_convert_type(values, jnp.int32), token_ids], axis=-1)
    pairs = shards.gather(pairs, axis=1)
    return lax.bitcast_convert_type(pairs[..., 0], jnp.float32), pairs[..., 1]


def _top_of_blocks(
    blocks: Float[Array, "rows blocks block"], block_max: Float[Array, "rows blocks"], count: int
) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """The best values of this device's blocks, and their places.

    The best `count` lie in the `count` blocks whose maxima are best: were one of them elsewhere, each of these blocks
    would hold a better one. The blocks are put back in order of ids, so that ties stay exact.
    """
    rows, num_blocks, _ = blocks.shape
    if num_blocks <= count:
        return _top_k(blocks.reshape(rows, -1), min(count, num_blocks * BLOCK_TOKENS))
    _, best = _top_k(block_max, count)
    best = jnp.sort(best, axis=-1)
    few = jnp.take_along_axis(blocks, best[:, :, None], axis=1, mode="clip")
    values, places = _top_k(few.reshape(rows, count * BLOCK_TOKENS), count)
    block = jnp.take_along_axis(best, places // BLOCK_TOKENS, axis=-1, mode="clip")
    return values, block * BLOCK_TOKENS + places % BLOCK_TOKENS


def _top_k(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """`lax.top_k`, which puts -0.0 after 0.0, for a world where they are equal."""
    best, places = lax.top_k(jnp.where(values == 0, 0, values), count)
    return best, places
