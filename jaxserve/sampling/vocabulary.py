"""Logits seen in blocks of neighbouring token ids: argmax, the few best, and one block, without sorting them all."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BLOCK_TOKENS = 128  # a block; Llama's 128256, Qwen's 151936 and SmolLM's 49152 are multiples of it


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One row's logits a row, in blocks, with the maximum of each block. Lives inside one trace; not a pytree.

    # token id    0 ....... 127 | 128 ..... 255 | ... | vocab - 1, then -inf up to a whole block
    # blocks[r]   [0, 0..127]   | [1, 0..127]   | ...
    """

    blocks: Float[Array, "rows blocks block"]
    block_max: Float[Array, "rows blocks"]
    max: Float[Array, " rows"]  # +inf where any logit is NaN
    size: int  # tokens, without the padding

    @classmethod
    def of(cls, logits: Float[Array, "rows vocab"]) -> Vocabulary:
        """Cut float32 logits into blocks."""
        rows, size = logits.shape
        padding = -size % BLOCK_TOKENS
        if padding:
            logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
        blocks = logits.reshape(rows, -1, BLOCK_TOKENS)
        # XLA:CPU's fast max passes over NaN; a sum never does, and costs less than looking for NaN.
        block_max = jnp.where(jnp.isnan(blocks.sum(axis=-1)), jnp.inf, blocks.max(axis=-1))
        return cls(blocks, block_max, block_max.max(axis=-1), size)

    @property
    def is_finite(self) -> Bool[Array, " rows"]:
        """Whether a token can be chosen: no NaN, no +inf, and not all -inf."""
        return jnp.isfinite(self.max)

    @property
    def token_ids(self) -> Int[Array, "1 blocks block"]:
        """The token id of each place in `blocks`."""
        count = self.blocks.shape[1]
        return jnp.arange(count * BLOCK_TOKENS, dtype=jnp.int32).reshape(1, count, BLOCK_TOKENS)

    def block(self, index: Int[Array, " rows"]) -> Float[Array, "rows block"]:
        """The logits of one block a row."""
        return jnp.take_along_axis(self.blocks, index[:, None, None], axis=1, mode="clip")[:, 0]

    def argmax(self) -> Int[Array, " rows"]:
        """The best token, of equals the lowest id. (XLA:CPU's own argmax is ten times slower.)"""
        block = first_true(self.block_max == self.max[:, None])
        within = first_true(self.block(block) == self.max[:, None])
        return block * BLOCK_TOKENS + within

    def top(self, count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
        """The `count` best logits, best first, of equals the lowest id first, and their token ids.

        The best `count` tokens lie in the `count` blocks whose maxima are best: were one of them elsewhere, each of
        these blocks would hold a better one. The blocks are put back in order of ids, so that ties stay exact.
        """
        rows, num_blocks, _ = self.blocks.shape
        if num_blocks <= count:
            return _top_k(self.blocks.reshape(rows, -1), min(count, self.size))
        _, best = _top_k(self.block_max, count)
        best = jnp.sort(best, axis=-1)
        few = jnp.take_along_axis(self.blocks, best[:, :, None], axis=1, mode="clip")
        values, places = _top_k(few.reshape(rows, count * BLOCK_TOKENS), count)
        block = jnp.take_along_axis(best, places // BLOCK_TOKENS, axis=-1, mode="clip")
        return values, block * BLOCK_TOKENS + places % BLOCK_TOKENS


def first_true(mask: Bool[Array, "rows n"]) -> Int[Array, " rows"]:
    """The first place that holds, 0 where none does."""
    return jnp.argmax(mask, axis=-1).astype(jnp.int32)


def _top_k(values: Float[Array, "rows n"], count: int) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """`lax.top_k`, which puts -0.0 after 0.0, for a world where they are equal."""
    best, places = lax.top_k(jnp.where(values == 0, 0, values), count)
    return best, places
