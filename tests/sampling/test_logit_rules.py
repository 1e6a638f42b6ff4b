"""Masks, bias and penalties, each against a plain NumPy oracle, seen through greedy tokens and through the logits."""

import jax
import numpy as np
import pytest

from jaxserve.sampling.inputs import SlotParameters
from jaxserve.sampling.logit_rules import HISTORY_CHUNK, apply_rules
from jaxserve.sampling_params import SamplingParams
from tests.sampling.sample_batch import EOS, random_logits, run

VOCAB_SIZE = 300
GREEDY = {"temperature": 0.0}
MAX_LEN = 2 * HISTORY_CHUNK + 100  # three chunks, the last of which overlaps

apply = jax.jit(apply_rules)


def ruled(
    logits: np.ndarray, params: list[SamplingParams], prompts: list[list[int]], outputs: list[list[int]]
) -> np.ndarray:
    """The logits after the rules."""
    rows, vocab_size = logits.shape
    slots = SlotParameters(rows, vocab_size)
    history = np.full((rows, MAX_LEN), 3, np.int32)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        slots.set(row + 1, params[row], stop_token_ids=[EOS], num_prompt_tokens=len(prompt))
        history[row, : len(prompt) + len(output)] = [*prompt, *output]
    num_tokens = np.array([len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)])
    variant, inputs = slots.gather(np.arange(1, rows + 1), num_tokens)
    assert variant == "full"
    return np.asarray(apply(logits, inputs, inputs.rules, history))


def penalised(logits: np.ndarray, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    expected = logits.astype(np.float64)
    for token in set(prompt) | set(output):
        expected[token] *= params.repetition_penalty if expected[token] <= 0 else 1 / params.repetition_penalty
    for token in set(output):
        expected[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return expected


def test_penalties_are_those_of_the_oracle_whatever_the_length():
    rng = np.random.default_rng(3)
    lengths = [(1, 0), (3, 20), (0, 30), (HISTORY_CHUNK - 5, 10), (HISTORY_CHUNK, HISTORY_CHUNK), (900, 224), (5, 600)]
    prompts = [rng.integers(0, VOCAB_SIZE, n).tolist() for n, _ in lengths]
    outputs = [rng.integers(0, 40, n).tolist() for _, n in lengths]
    params = [
        SamplingParams(
            seed=1,
            repetition_penalty=[1.0, 1.3, 0.7][i % 3],
            frequency_penalty=[0.5, 0.0, -0.3][i % 3],
            presence_penalty=[0.0, 0.7, -1.0, 0.2][i % 4],
        )
        for i in range(len(lengths))
    ]
    logits = random_logits(len(lengths), VOCAB_SIZE)
    found = ruled(logits, params, prompts, outputs)
    expected = [penalised(*row) for row in zip(logits, params, prompts, outputs, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_ask_for_nothing_keep_their_logits_bit_for_bit():
    logits = random_logits(5, VOCAB_SIZE)
    params = [
        SamplingParams(seed=1),
        SamplingParams(repetition_penalty=1.5, seed=1),
        SamplingParams(allowed_token_ids=[5], seed=1),
        SamplingParams(logit_bias={5: 1.0}, seed=1),
        SamplingParams(min_tokens=5, seed=1),
    ]
    found = ruled(logits, params, [[1, 2]] * 5, [[3, 4]] * 5)
    np.testing.assert_array_equal(found[0], logits[0])
    assert (found[1:] != logits[1:]).any(axis=-1).all()


def test_logit_bias_is_added_to_its_tokens_alone():
    logits = random_logits(2, VOCAB_SIZE)
    bias = {0: 100.0, 7: -100.0, VOCAB_SIZE - 1: 0.5}
    found = ruled(logits, [SamplingParams(logit_bias=bias, seed=1), SamplingParams(seed=1)], [[1]] * 2, [[]] * 2)
    expected = logits.copy()
    expected[0, list(bias)] += np.array(list(bias.values()), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("others", [GREEDY, {"temperature": 1.0, "seed": 5}, {"top_p": 0.9, "top_k": 20, "seed": 5}])
def test_a_bias_of_100_forces_a_token_and_minus_100_bans_it(others):
    logits = random_logits(3, VOCAB_SIZE)
    best = int(logits[0].argmax())
    params = [SamplingParams(logit_bias={int(logits[1].argmin()): 100.0}, **others)] * 3
    assert run(logits, params).token_ids[1] == logits[1].argmin()
    assert run(logits, [SamplingParams(logit_bias={best: -100.0}, **others)] * 3).token_ids[0] != best


def test_only_allowed_tokens_are_chosen_and_other_rows_are_free():
    logits = random_logits(3, VOCAB_SIZE)
    allowed = [3, 31, 32, 299]
    params = [SamplingParams(allowed_token_ids=allowed, **GREEDY), SamplingParams(**GREEDY), SamplingParams(seed=1)]
    result = run(logits, params)
    assert result.token_ids[0] == max(allowed, key=lambda token: logits[0, token])
    assert result.token_ids[1] == logits[1].argmax()
    assert result.token_ids[2] == run(logits[2:], params[2:]).token_ids[0]
    drawn = run(
        np.zeros((64, VOCAB_SIZE)), [SamplingParams(allowed_token_ids=allowed, seed=i) for i in range(64)]
    ).token_ids
    assert set(drawn.tolist()) == set(allowed)


@pytest.mark.parametrize(
    ("bad_words", "output", "banned"),
    [
        ([[9]], [], {9}),  # a single token, at the start
        ([[9]], [1, 2], {9}),
        ([[5, 9]], [], set()),  # nothing to complete yet
        ([[5, 9]], [5], {9}),
        ([[5, 9]], [5, 5], {9}),
        ([[5, 9]], [5, 6], set()),
        ([[5, 6, 9]], [6], set()),  # longer than the output
        ([[5, 6, 9]], [5, 6], {9}),
        ([[5, 6, 9], [6, 8], [7]], [5, 6], {7, 8, 9}),
        ([[*range(10, 25), 9]], list(range(10, 25)), {9}),  # the longest
        ([[*range(10, 25), 9]], list(range(11, 25)), set()),
        ([[5, 9]] * 64, [5], {9}),  # the most
    ],
)
def test_a_bad_word_s_last_token_is_banned_once_the_output_ends_with_the_others(bad_words, output, banned):
    logits = random_logits(1, VOCAB_SIZE)
    prompt = [5]  # the prompt's tokens complete nothing
    found = ruled(logits, [SamplingParams(bad_words_token_ids=bad_words, seed=1)], [prompt], [output])[0]
    assert set(np.flatnonzero(np.isneginf(found)).tolist()) == banned
    keep = np.setdiff1d(np.arange(VOCAB_SIZE), list(banned))
    np.testing.assert_array_equal(found[keep], logits[0, keep])


def test_stop_tokens_are_masked_until_min_tokens_are_generated():
    logits = np.zeros((3, VOCAB_SIZE), np.float32)
    logits[:, EOS], logits[:, 8], logits[:, 9] = 9.0, 8.0, 7.0
    params = [SamplingParams(min_tokens=2, stop_token_ids=[8], **GREEDY)] * 3
    tokens = run(logits, params, prompts=[[1] * 5] * 3, outputs=[[], [4], [4, 4]]).token_ids
    np.testing.assert_array_equal(tokens, [9, 9, EOS])


def test_rules_apply_together():
    logits = np.zeros((1, VOCAB_SIZE), np.float32)
    logits[0, :5] = [5.0, 4.0, 3.0, 2.0, 1.0]
    params = SamplingParams(
        allowed_token_ids=[0, 1, 2, 3],
        bad_words_token_ids=[[0]],
        min_tokens=3,
        logit_bias={1: -1.5},
        frequency_penalty=1.0,
        **GREEDY,
    )
    # 0 is a bad word, 1 has 2.5 left, 2 is EOS, 3 has 2.0, 4 is not allowed; one use of 1 takes 1.0 from it.
    assert run(logits, [params]).token_ids[0] == 1
    assert run(logits, [params], outputs=[[1]]).token_ids[0] == 3


def test_a_row_with_no_token_left_is_flagged_alone():
    logits = random_logits(3, VOCAB_SIZE)
    params = [
        SamplingParams(allowed_token_ids=[4, 5], bad_words_token_ids=[[4], [5]], seed=1),
        SamplingParams(allowed_token_ids=[EOS], min_tokens=3, **GREEDY),
        SamplingParams(seed=1),
    ]
    result = run(logits, params)
    np.testing.assert_array_equal(result.ok, [False, False, True])
    np.testing.assert_array_equal(result.token_ids[:2], 0)
    assert result.model_ok.all()


def test_a_penalty_that_overflows_is_told_from_a_model_that_does():
    logits = random_logits(3, VOCAB_SIZE)
    logits[0, 1] = 1e38
    logits[1, 4] = np.nan
    params = [SamplingParams(repetition_penalty=0.01, **GREEDY)] * 3
    result = run(logits, params)
    np.testing.assert_array_equal(result.ok, [False, False, True])
    np.testing.assert_array_equal(result.model_ok, [True, False, True])
