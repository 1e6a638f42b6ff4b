"""The jitted functions of a draft head, each written for one data shard; `HeadPrograms` runs them on all.

# position p of the head   reads token p + 1, and what the model or the head itself gave at p or p - 1
#                          writes its K and V of p, and its state, whose logits are of token p + 2
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.models.head import DraftHead
from jaxserve.runner.model_graph import ModelGraph, Params
from jaxserve.runner.step import ForwardBatch, SampleBatch, sample_rows
from jaxserve.sampling.inputs import SamplingInputs, Variant
from jaxserve.sampling.sampler import SampledTokens


def follow(
    graph: ModelGraph,
    params: Params,
    caches: list[LayerCache],
    states: Float[Array, "slots states hidden"],
    tokens: Int[Array, "slots positions"],
    block_tables: Int[Array, "slots blocks_per_seq"],
    batch: ForwardBatch,
    features: Float[Array, "tokens features"],
) -> tuple[Float[Array, "slots states hidden"], list[LayerCache]]:
    """Go over the tokens that the model has just computed, once each row's next token is in the table.

    Behind a draft that did not hold all is wrong, as it is in the model's own K and V, and written again by the next
    step before it is read.
    """
    head: DraftHead = graph.bind(params)
    return _advance(head, head.combine(features), caches, states, tokens, block_tables, batch)


def advance(
    graph: ModelGraph,
    params: Params,
    caches: list[LayerCache],
    states: Float[Array, "slots states hidden"],
    tokens: Int[Array, "slots positions"],
    block_tables: Int[Array, "slots blocks_per_seq"],
    batch: ForwardBatch,
) -> tuple[Float[Array, "slots states hidden"], list[LayerCache]]:
    """Go one draft further, on the head's own state of the position before; a token a row."""
    number = (jnp.asarray(batch.positions) - 1) % states.shape[1]
    head: DraftHead = graph.bind(params)
    return _advance(head, states[batch.token_slots, number], caches, states, tokens, block_tables, batch)


def _advance(
    head: DraftHead,
    x: jax.Array,
    caches: list[LayerCache],
    states: jax.Array,
    tokens: jax.Array,
    block_tables: jax.Array,
    batch: ForwardBatch,
) -> tuple[jax.Array, list[LayerCache]]:
    slots, positions = jnp.asarray(batch.token_slots), jnp.asarray(batch.positions)
    inputs = batch.step_inputs(block_tables)
    # Of a sequence's last possible position the next token is never asked.
    token_ids = tokens[slots, jnp.minimum(positions + 1, tokens.shape[1] - 1)]
    x, caches = head.advance(token_ids, x, positions, caches, inputs)
    num_states = states.shape[1]
    # A row's tokens are side by side: its last `num_states` are those with another row's, or nobody's, so far behind.
    behind = jnp.pad(slots[num_states:], (0, min(num_states, len(slots))))
    kept = jnp.where(behind == slots, 0, slots)  # the others go to the padding slot
    return states.at[kept, positions % num_states].set(x), caches


def draw(
    graph: ModelGraph,
    params: Params,
    states: Float[Array, "slots states hidden"],
    tokens: Int[Array, "slots positions"],
    batch: SampleBatch,
    inputs: SamplingInputs,
    *,
    variant: Variant,
) -> tuple[Int[Array, "slots positions"], SampledTokens]:
    """Draw a draft a row, with the request's own parameters and random numbers, and write it into the token table."""
    number = (jnp.asarray(batch.positions) - 2) % states.shape[1]
    return sample_rows(graph, params, states[batch.slots, number], tokens, batch, inputs, variant=variant)
