"""The host's side: which variant a step needs, what its arrays hold, and that slots forget their former requests."""

import jax
import numpy as np
import pytest

from jaxserve.sampling.inputs import VARIANTS, LogitRules, SlotParameters, abstract_inputs
from jaxserve.sampling_params import MAX_BAD_WORDS, SamplingParams

GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(seed=1)
FULL = SamplingParams(seed=1, logprobs=0)


def slots_of(*params: SamplingParams, vocab_size: int = 100) -> SlotParameters:
    slots = SlotParameters(len(params), vocab_size)
    for slot, one in enumerate(params, start=1):
        slots.set(slot, one, stop_token_ids=[2], num_prompt_tokens=10)
    return slots


@pytest.mark.parametrize(
    ("params", "variant"),
    [
        ((GREEDY, GREEDY), "greedy"),
        ((GREEDY, RANDOM), "random"),
        ((GREEDY, RANDOM, FULL), "full"),
        ((SamplingParams(temperature=0.0, top_p=0.5, top_k=3, min_p=0.1),), "greedy"),
        ((SamplingParams(seed=1, top_p=0.5, top_k=3, min_p=0.1),), "random"),
        ((SamplingParams(temperature=0.0, presence_penalty=0.1),), "full"),
        ((SamplingParams(temperature=0.0, frequency_penalty=0.1),), "full"),
        ((SamplingParams(temperature=0.0, repetition_penalty=1.1),), "full"),
        ((SamplingParams(temperature=0.0, logit_bias={1: 1.0}),), "full"),
        ((SamplingParams(temperature=0.0, allowed_token_ids=[1]),), "full"),
        ((SamplingParams(temperature=0.0, bad_words_token_ids=[[1]]),), "full"),
        ((SamplingParams(temperature=0.0, min_tokens=1),), "full"),
    ],
)
def test_a_step_runs_the_least_variant_that_serves_all_its_rows(params, variant):
    found, inputs = slots_of(*params).gather(np.arange(1, len(params) + 1), np.full(len(params), 10))
    assert found == variant
    assert (inputs.rules is None) == (variant != "full")


def test_a_row_past_its_min_tokens_no_longer_asks_for_the_full_variant():
    slots = slots_of(SamplingParams(temperature=0.0, min_tokens=3))
    assert slots.gather(np.array([1]), np.array([12]))[0] == "full"
    assert slots.gather(np.array([1]), np.array([13]))[0] == "greedy"


def test_rules_are_gathered_once_for_rows_that_come_in_turns_and_anew_for_a_new_request():
    slots = slots_of(FULL, FULL, SamplingParams(seed=1, logit_bias={7: 1.0}))
    of_model, of_drafts = np.array([1, 2, 3]), np.array([1, 3])

    def rules(rows: np.ndarray) -> LogitRules:
        found = slots.gather(rows, np.full(len(rows), 10), num_rows=4)[1].rules
        assert found is not None
        return found

    first = rules(of_model), rules(of_drafts)
    assert all(now is then for now, then in zip((rules(of_model), rules(of_drafts)), first, strict=True))
    for row in (1, 2, 3):
        for other in (1, 2):
            rules(np.array([row, other]))
    assert len(slots._gathered) == 4  # what was not used lately is let go
    slots.set(3, SamplingParams(seed=1, logit_bias={8: 1.0}), stop_token_ids=[2], num_prompt_tokens=10)
    assert rules(of_drafts).bias_ids[1, 0] == 8


def test_padding_rows_are_greedy_and_shapes_are_those_compiled_for():
    slots = slots_of(GREEDY, RANDOM, FULL)
    for rows, expected in enumerate(VARIANTS, start=1):
        variant, inputs = slots.gather(np.arange(1, rows + 1), np.full(rows, 10), num_rows=8)
        assert variant == expected
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), inputs)
        assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), abstract_inputs(8, variant, vocab_size=100))
        assert not np.asarray(inputs.temperature)[rows:].any()


def test_gathered_rows_come_in_the_order_of_their_slots():
    slots = slots_of(*(SamplingParams(seed=s, top_k=s, temperature=s / 10) for s in range(1, 6)))
    _, inputs = slots.gather(np.array([4, 2]), np.array([15, 10]), num_rows=3)
    np.testing.assert_array_equal(inputs.top_k, [4, 2, 0])
    np.testing.assert_array_equal(inputs.position, [5, 0, 0])
    np.testing.assert_array_equal(inputs.num_tokens, [15, 10, 0])
    np.testing.assert_array_equal(inputs.num_prompt_tokens, [10, 10, 0])
    np.testing.assert_allclose(inputs.temperature, [0.4, 0.2, 0.0])


def test_a_gathered_step_does_not_change_when_a_slot_does():
    slots = slots_of(RANDOM, FULL)
    _, inputs = slots.gather(np.array([1, 2]), np.array([11, 11]))
    before = jax.tree.map(np.copy, inputs)
    slots.set(1, SamplingParams(seed=9, top_k=7, allowed_token_ids=[3]), stop_token_ids=[4], num_prompt_tokens=2)
    jax.tree.map(np.testing.assert_array_equal, inputs, before)


def test_a_slot_forgets_its_former_request():
    asks_all = SamplingParams(
        seed=2**64 - 1,
        top_k=4,
        min_tokens=20,
        logit_bias={3: 1.0},
        allowed_token_ids=[5],
        bad_words_token_ids=[[1, 2]] * MAX_BAD_WORDS,
        frequency_penalty=1.0,
    )
    slots = slots_of(asks_all)
    assert slots.gather(np.array([1]), np.array([10]))[0] == "full"
    slots.set(1, FULL, stop_token_ids=[2], num_prompt_tokens=10)
    _, inputs = slots.gather(np.array([1]), np.array([10]))
    _, expected = slots_of(FULL).gather(np.array([1]), np.array([10]))
    jax.tree.map(np.testing.assert_array_equal, inputs, expected)


def test_rules_stay_on_the_device_while_the_same_rows_come_again():
    slots = SlotParameters(3, 100, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    slots.set(1, FULL, stop_token_ids=[2], num_prompt_tokens=10)
    first = slots.gather(np.array([1]), np.array([10]))[1].rules
    assert isinstance(first, LogitRules)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(first))
    assert slots.gather(np.array([1]), np.array([11]))[1].rules is first
    slots.set(2, RANDOM, stop_token_ids=[2], num_prompt_tokens=10)
    assert slots.gather(np.array([1]), np.array([12]))[1].rules is not first


def test_top_k_of_the_whole_vocabulary_or_minus_one_is_none():
    slots = slots_of(*(SamplingParams(seed=1, top_k=k) for k in (-1, 0, 99, 100, 2**31 - 1)))
    _, inputs = slots.gather(np.arange(1, 6), np.full(5, 10))
    np.testing.assert_array_equal(inputs.top_k, [0, 0, 99, 0, 0])


def test_a_sampled_request_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        slots_of(SamplingParams(temperature=1.0))
