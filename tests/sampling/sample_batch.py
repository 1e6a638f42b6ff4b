"""Runs the sampler on a batch the way the runner does: parameters into slots, gathered, padded, under jit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np

from jaxserve.sampling.inputs import VARIANTS, LogitRules, SlotParameters, Variant
from jaxserve.sampling.sampler import SampledTokens, sample
from jaxserve.sampling_params import SamplingParams
from tests.sampling.split_vocabulary import split_sampler

EOS = 2
MAX_LEN = 40
NUM_ROWS = 32  # of a batch, unless it has more


@cache
def compiled(variant: Variant):
    return jax.jit(partial(sample, variant=variant))


def run(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    variant: Variant | None = None,
    num_rows: int | None = None,
    num_shards: int = 1,
) -> SampledTokens:
    """One token a row of `logits`, padded to `num_rows`; padding rows are cut off again. NumPy leaves.

    With `num_shards` so many devices have a part of the vocabulary each.

    Few shapes, few compilations: the default is the next of NUM_ROWS, twice that ...
    """
    rows, vocab_size = logits.shape
    prompts = [[1]] * rows if prompts is None else prompts
    outputs = [[]] * rows if outputs is None else outputs
    slots = SlotParameters(rows, vocab_size)
    padded = max(NUM_ROWS, 1 << (rows - 1).bit_length()) if num_rows is None else num_rows
    history = np.full((padded, MAX_LEN), 3, np.int32)  # what lies behind the end must not matter
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        stop_token_ids = [EOS, *(params[row].stop_token_ids or ())]
        slots.set(row + 1, params[row], stop_token_ids=stop_token_ids, num_prompt_tokens=len(prompt))
        history[row, : len(prompt) + len(output)] = [*prompt, *output]
    num_tokens = np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)], np.int32)
    found, inputs = slots.gather(np.arange(1, rows + 1), num_tokens, num_rows=padded)
    variant = found if variant is None else variant
    assert VARIANTS.index(variant) >= VARIANTS.index(found)
    if variant == "full" and inputs.rules is None:
        inputs = replace(inputs, rules=LogitRules.empty(padded, vocab_size))
    padding = np.zeros((padded - rows, vocab_size), np.float32)
    padded_logits = np.concatenate([logits.astype(np.float32), padding])
    sampler = compiled(variant) if num_shards == 1 else split_sampler(variant, num_shards)
    result = sampler(padded_logits, inputs, history=history if variant == "full" else None)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:rows], result)


def draws(logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """`count` tokens drawn from one row of logits with as many seeds, in batches of NUM_ROWS."""
    batch = np.broadcast_to(logits, (NUM_ROWS, len(logits)))
    seeded = [replace(params, seed=seed) for seed in range(count)]
    runs = [run(batch, seeded[begin : begin + NUM_ROWS]).token_ids for begin in range(0, count, NUM_ROWS)]
    return np.concatenate(runs)


def random_logits(rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocab_size)) * scale).astype(np.float32)
