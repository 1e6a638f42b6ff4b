"""The jitted functions of a step: forward (model), sample (head and sampler), and the small ones around them.

Each is written for one data shard: its token table, its pools, its rows. `Programs` runs it on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.layers.attention import StepInputs
from jaxserve.parallel.mesh import EVERYWHERE, TENSOR, partition_spec
from jaxserve.runner.batch import HostBatch, padded
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.sampling.inputs import SamplingInputs, Variant
from jaxserve.sampling.sampler import SampledTokens, prompt_logprobs, sample
from pallas_kernels.paged_attention import AttentionMetadata

PROMPT_LOGPROB_ROWS = 64  # prompt positions scored at once


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_slots", "positions", "kv_slots", "row_slots", "sample_tokens", "num_tokens", "metadata"],
    meta_fields=[],
)
@dataclass(frozen=True)
class ForwardBatch:
    """What the model needs to know of a step; all int32, packed into one buffer on the way to the device."""

    token_slots: jax.Array | np.ndarray  # i32[tokens]
    positions: jax.Array | np.ndarray  # i32[tokens]
    kv_slots: jax.Array | np.ndarray  # i32[tokens]
    row_slots: jax.Array | np.ndarray  # i32[rows], whose block table each row has; 0 for padding
    sample_tokens: jax.Array | np.ndarray  # i32[rows], which of the tokens yield a new one
    num_tokens: jax.Array | np.ndarray  # i32[], behind which all is padding
    metadata: AttentionMetadata  # without block tables

    @classmethod
    def from_host(cls, batch: HostBatch) -> ForwardBatch:
        """The model's share of a host batch."""
        return cls(
            token_slots=batch.token_slots,
            positions=batch.positions,
            kv_slots=batch.kv_slots,
            row_slots=padded(batch.row_slots, batch.bucket.num_rows),
            sample_tokens=batch.samples.tokens,
            num_tokens=np.array(batch.num_tokens.sum(), np.int32),
            metadata=batch.metadata,
        )

    def step_inputs(self, block_tables: Int[Array, "slots blocks_per_seq"]) -> StepInputs:
        """What all layers are told; `block_tables` are those of all slots."""
        metadata = self.metadata.with_tables(block_tables[self.row_slots])
        return StepInputs(
            metadata=metadata, kv_slots=jnp.asarray(self.kv_slots), num_tokens=jnp.asarray(self.num_tokens)
        )


def forward(
    graph: ModelGraph,
    params: Params,
    caches: list[LayerCache],
    tokens: Int[Array, "slots positions"],
    block_tables: Int[Array, "slots blocks_per_seq"],
    batch: ForwardBatch,
) -> tuple[
    Float[Array, "tokens hidden"], Float[Array, "rows hidden"], Float[Array, "tokens features"] | None, list[LayerCache]
]:
    """Run the model over the step's tokens: (all hidden states, those that yield a token, features, written caches).

    Features are what a draft head reads of inner layers, None where there is no such head.
    """
    token_ids = tokens[batch.token_slots, batch.positions]
    inputs = batch.step_inputs(block_tables)
    hidden, features, caches = graph.bind(params).hidden_states(token_ids, jnp.asarray(batch.positions), caches, inputs)
    return hidden, hidden[batch.sample_tokens], features, caches


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["slots", "positions", "num_rows"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SampleBatch:
    """Where each new token goes in the token table; int32, padded with slot 0."""

    slots: jax.Array | np.ndarray  # i32[rows]
    positions: jax.Array | np.ndarray  # i32[rows]
    num_rows: jax.Array | np.ndarray  # i32[], behind which all is padding

    @classmethod
    def from_host(cls, batch: HostBatch) -> SampleBatch:
        """The sampler's share of a host batch."""
        samples = batch.samples
        return cls(samples.slots, samples.positions, np.array(len(samples), np.int32))


def sample_rows(
    graph: ModelGraph,
    head: Params,
    hidden: Float[Array, "rows hidden"],
    tokens: Int[Array, "slots positions"],
    batch: SampleBatch,
    inputs: SamplingInputs,
    *,
    variant: Variant,
) -> tuple[Int[Array, "slots positions"], SampledTokens]:
    """Sample one token a row and write it where the next step reads it; padding writes to slot 0.

    A row is a place in a sequence: behind drafts a sequence has several. Each sees the drafts before it as history,
    and is drawn with the key of its own place, so it is what plain decoding would draw if these drafts are right.
    """
    history = tokens[batch.slots] if variant == "full" else None

    def choose(logits: jax.Array, inputs: SamplingInputs, history: jax.Array | None, **split: Any) -> SampledTokens:
        return sample(logits, inputs, variant, history=history, **split)

    sampled = _on_logits(graph, head, hidden, batch.num_rows, choose, inputs, history)
    return tokens.at[batch.slots, batch.positions].set(sampled.token_ids), sampled


def take_rows(
    hidden: Float[Array, "tokens hidden"], indices: Int[Array, " positions"]
) -> Float[Array, "positions hidden"]:
    """The hidden states of some of the step's positions."""
    return hidden[indices]


def score_prompt(
    graph: ModelGraph,
    head: Params,
    hidden: Float[Array, "positions hidden"],
    target_ids: Int[Array, " positions"],
) -> SampledTokens:
    """Log-probabilities of known next tokens."""
    return _on_logits(graph, head, hidden, None, prompt_logprobs, target_ids)


def _on_logits(
    graph: ModelGraph,
    head: Params,
    hidden: jax.Array,
    num_rows: jax.Array | np.ndarray | None,
    function: Callable[..., SampledTokens],
    *whole: Any,
) -> SampledTokens:
    """`function` of the logits of `hidden`; where the vocabulary is split, of each device's part of them."""
    logits = graph.bind(head).logits(hidden, num_rows)
    shards = graph.vocabulary_shards
    run = partial(function, vocab_size=graph.config.vocab_size, shards=shards)
    if shards.count > 1:
        run = jax.shard_map(
            run,
            in_specs=(partition_spec((None, "vocab")), *(EVERYWHERE for _ in whole)),
            out_specs=EVERYWHERE,
            axis_names={TENSOR},
            check_vma=False,
        )
    return run(logits, *whole)


def write_entries(table: Int[Array, "slots columns"], entries: Int[Array, "3 entries"]) -> Int[Array, "slots columns"]:
    """Put guessed tokens or new blocks where the step reads them; rows of `entries`: slot, column, value."""
    slots, columns, values = entries
    return table.at[slots, columns].set(values)


def write_slot(
    tokens: Int[Array, "slots positions"],
    block_tables: Int[Array, "slots blocks_per_seq"],
    slot: Int[Array, 1],
    token_row: Int[Array, " positions"],
    table_row: Int[Array, " blocks_per_seq"],
) -> tuple[Int[Array, "slots positions"], Int[Array, "slots blocks_per_seq"]]:
    """Replace a slot's known tokens and its block table: a request moves in."""
    return tokens.at[slot].set(token_row), block_tables.at[slot].set(table_row)
