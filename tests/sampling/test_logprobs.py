"""Log-probabilities and ranks against a float64 log-softmax of the raw logits."""

import jax
import numpy as np
import pytest

from jaxserve.sampling.sampler import prompt_logprobs
from jaxserve.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.sampling.sample_batch import random_logits, run


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("vocab_size", [30, 300, 49152])
def test_logprobs_are_those_of_the_raw_logits(vocab_size):
    logits = random_logits(4, vocab_size, scale=6.0)
    params = [
        SamplingParams(logprobs=5, temperature=0.0),
        SamplingParams(logprobs=0, temperature=2.0, seed=1),
        SamplingParams(logprobs=20, temperature=0.3, top_k=3, seed=2),
        SamplingParams(logprobs=1, repetition_penalty=2.0, logit_bias={4: 50.0}, seed=3),
    ]
    result = run(logits, params)
    expected, rows = log_softmax(logits), np.arange(4)
    np.testing.assert_allclose(result.logprobs, expected[rows, result.token_ids], atol=1e-5)
    np.testing.assert_array_equal(result.ranks, 1 + (logits > logits[rows, result.token_ids][:, None]).sum(-1))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(result.top_token_ids, order)
    np.testing.assert_allclose(result.top_logprobs, np.take_along_axis(expected, order, -1), atol=1e-5)
    assert result.token_ids[3] == 4


def test_the_most_likely_token_has_rank_one_and_ties_share_it():
    logits = np.zeros((1, 200), np.float32)
    result = run(logits, [SamplingParams(logprobs=1, seed=1)])
    assert result.ranks[0] == 1
    np.testing.assert_array_equal(result.top_token_ids[0], np.arange(MAX_LOGPROBS))


def test_prompt_logprobs_score_the_given_tokens():
    logits = random_logits(64, 300)
    target_ids = np.random.default_rng(1).integers(0, 300, 64).astype(np.int32)
    logits[9, 5] = np.nan
    result = jax.tree.map(np.asarray, jax.jit(prompt_logprobs)(logits, target_ids))
    fine = np.arange(64) != 9
    np.testing.assert_array_equal(result.ok, fine)
    np.testing.assert_array_equal(result.token_ids, target_ids)
    expected = log_softmax(logits)[np.arange(64), target_ids]
    np.testing.assert_allclose(result.logprobs[fine], expected[fine], atol=1e-5)
    assert (result.ranks[fine] == 1 + (logits > logits[np.arange(64), target_ids][:, None]).sum(-1)[fine]).all()
