"""A vocabulary split over devices gives the tokens and log-probabilities of one in one piece, and little is sent."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxserve.plan.hlo import collectives
from jaxserve.sampling.inputs import VARIANTS, abstract_inputs
from jaxserve.sampling_params import SamplingParams
from tests.sampling.sample_batch import random_logits, run
from tests.sampling.split_vocabulary import split_sampler
from tests.sampling.test_draw import MIXES, mixed_rows

NUM_SHARDS = [2, 4, 8]
# Each variant on each number of devices is here, or below with a small vocabulary.
SPLITS = [*(("greedy", size) for size in NUM_SHARDS), ("random", 2), ("random", 4), ("full", 4), ("full", 8)]

RULES = [
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(logprobs=20),
    SamplingParams(allowed_token_ids=[0, 127, 128, 255, 299]),
    SamplingParams(temperature=0.0, allowed_token_ids=[299]),
    SamplingParams(logit_bias={0: 5.0, 128: 5.0, 299: 5.0}),
    SamplingParams(temperature=0.0, logit_bias={7: -100.0, 130: 100.0}),
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(repetition_penalty=0.5, presence_penalty=0.7, frequency_penalty=0.3, top_p=0.9),
    SamplingParams(temperature=0.0, bad_words_token_ids=[[130], [128, 129, 131]]),
    SamplingParams(min_tokens=9, stop_token_ids=[131, 299], top_k=3),
    SamplingParams(temperature=0.0, allowed_token_ids=[]),  # nothing is left to choose
]


def same(given, wanted) -> None:
    """Tokens, ranks and alternatives are equal; log-probabilities but for rounding."""
    for name in ("token_ids", "ok", "model_ok", "ranks", "top_token_ids"):
        np.testing.assert_array_equal(getattr(given, name), getattr(wanted, name), err_msg=name)
    for name in ("logprobs", "top_logprobs"):
        a, b = getattr(given, name), getattr(wanted, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("variant", "num_shards"), SPLITS)
def test_split_logits_give_the_same_tokens(variant, num_shards):
    logits, params, outputs = mixed_rows()
    if variant == "greedy":
        params = [replace(p, temperature=0.0) for p in params]
    given, wanted = (run(logits, params, outputs=outputs, variant=variant, num_shards=n) for n in (num_shards, 1))
    same(given, wanted)


@pytest.mark.parametrize("num_shards", [4, 8])
def test_a_vocabulary_of_fewer_blocks_than_devices_gives_the_same_tokens(num_shards):
    params = [replace(mix, seed=50 + i) for i, mix in enumerate(MIXES)]
    logits = random_logits(len(params), 300)
    same(run(logits, params, num_shards=num_shards), run(logits, params))


@pytest.mark.parametrize("num_shards", NUM_SHARDS)
def test_rules_change_the_same_tokens(num_shards):
    params = [replace(rule, seed=i) for i, rule in enumerate(RULES)]
    logits = random_logits(len(params), 300)
    prompts = [[5, 128, 299]] * len(params)
    outputs = [[128, 129]] * len(params)
    given, wanted = (run(logits, params, prompts=prompts, outputs=outputs, num_shards=n) for n in (num_shards, 1))
    assert not wanted.ok[-1]
    same(given, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_logits_on_several_devices_go_to_the_lowest_id(variant):
    logits = np.zeros((4, 9000), np.float32)
    logits[1, [7000, 3000, 130]] = 3.0
    logits[2, 8999] = 1.0
    logits[3] = -0.0
    params = [SamplingParams(temperature=0.0)] * 4
    given = run(logits, params, variant=variant, num_shards=4)
    assert given.token_ids.tolist() == [0, 130, 8999, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_finite_on_one_device_spoils_its_row_alone(variant, bad):
    logits = random_logits(3, 9000)
    logits[1, 6000] = bad
    if bad == -np.inf:
        logits[1] = bad
    params = [SamplingParams(temperature=0.0)] * 3
    given, clean = run(logits, params, variant=variant, num_shards=4), run(logits[::2], params[::2], variant=variant)
    assert given.ok.tolist() == given.model_ok.tolist() == [True, False, True]
    np.testing.assert_array_equal(given.token_ids, [clean.token_ids[0], 0, clean.token_ids[1]])


# greedy: the best of each device. random: that; the best few; in the loop over draws, the blocks' weights and the block
# that was drawn; in the loop over top_k, a count. full: the best of each device, of raw and of ruled logits; the few,
# the draws and the count; and for the scores the blocks' weights, the token's logit, its rank and the best few.
EXPECTED = {
    "greedy": {"all-gather": 1},
    "random": {"all-gather": 3, "all-reduce": 2},
    "full": {"all-gather": 6, "all-reduce": 4},
}


@pytest.mark.usefixtures("fused_as_served")
@pytest.mark.parametrize("variant", VARIANTS)
def test_little_is_sent(variant):
    rows, vocab_size = 4, 4096
    logits = jax.ShapeDtypeStruct((rows, vocab_size), np.float32)
    inputs = abstract_inputs(rows, variant, vocab_size=vocab_size)
    history = jax.ShapeDtypeStruct((rows, 64), np.int32)
    compiled = split_sampler(variant, 4).lower(logits, inputs, history).compile()
    found = collectives(compiled.as_text())
    assert found == EXPECTED[variant]
