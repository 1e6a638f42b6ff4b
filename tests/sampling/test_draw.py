"""Drawn tokens: their distribution, what parameters have in common, and what they must not depend on."""

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.sampling.inputs import VARIANTS
from jaxserve.sampling_params import SamplingParams
from tests.sampling.distribution import assert_drawn_from, distribution
from tests.sampling.sample_batch import draws, random_logits, run

MIXES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=3.0),
    SamplingParams(top_k=5),
    SamplingParams(top_k=100, temperature=4.0),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=0.97, temperature=2.0),
    SamplingParams(min_p=0.1),
    SamplingParams(min_p=0.02, top_p=0.9),
    SamplingParams(top_k=20, top_p=0.7, temperature=1.5),
    SamplingParams(top_k=90, top_p=0.9, temperature=3.0),
    SamplingParams(top_k=90, top_p=0.9, min_p=0.2, temperature=3.0),
    SamplingParams(top_k=30, top_p=0.95, min_p=0.05, temperature=0.7),
]


@pytest.mark.parametrize("params", MIXES, ids=lambda p: f"t{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
@pytest.mark.parametrize("vocab_size", [12, 300])
def test_tokens_follow_their_distribution(params, vocab_size):
    logits = random_logits(1, vocab_size, scale=2.0)[0]
    assert_drawn_from(distribution(logits, params), draws(logits, params, 4096))


def test_positions_of_one_seed_draw_independently():
    logits = random_logits(1, 12, scale=1.0)
    batch = np.repeat(logits, 32, axis=0)
    outputs = [[5] * n for n in range(32)]
    params = [SamplingParams(seed=seed) for seed in range(64)]
    tokens = np.stack([run(batch, [p] * 32, outputs=outputs).token_ids for p in params])  # [seeds, positions]
    assert_drawn_from(distribution(logits[0], params[0]), tokens.reshape(-1))
    pairs = tokens[:, :-1] * 12 + tokens[:, 1:]
    single = distribution(logits[0], params[0])
    assert_drawn_from(np.outer(single, single).reshape(-1), pairs.reshape(-1))


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_both_halves_of_a_seed_count(seed):
    logits = np.zeros((1, 9000), np.float32)
    low = run(logits, [SamplingParams(seed=seed & 0xFFFFFFFF)]).token_ids
    assert run(logits, [SamplingParams(seed=seed)]).token_ids != low


@pytest.mark.parametrize("vocab_size", [12, 300, 9000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1, temperature=5.0),
        SamplingParams(top_p=1e-6, temperature=5.0),
        SamplingParams(top_p=1e-38),
        SamplingParams(top_p=1e-6, top_k=5),
        SamplingParams(temperature=2e-5, top_k=3),
        SamplingParams(temperature=1e-7),
    ],
    ids=str,
)
def test_parameters_that_leave_one_token_are_greedy_even_where_logits_tie(params, vocab_size):
    logits = np.round(random_logits(32, vocab_size))
    if params.temperature == 2e-5:
        logits = random_logits(32, vocab_size)
    tokens = run(logits, [replace(params, seed=seed) for seed in range(32)]).token_ids
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_min_p_of_one_is_greedy_where_nothing_ties():
    logits = random_logits(32, 300)
    tokens = run(logits, [SamplingParams(min_p=1.0, seed=seed) for seed in range(32)]).token_ids
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def mixed_rows() -> tuple[np.ndarray, list[SamplingParams], list[list[int]]]:
    """Rows of every kind at several output positions, and some greedy ones among them."""
    mixes = [*MIXES, SamplingParams(temperature=0.0), SamplingParams(top_k=1)]
    params = [replace(mix, seed=1000 + i) for i, mix in enumerate(mixes)]
    outputs = [[7] * (i % 5) for i in range(len(params))]
    return random_logits(len(params), 9000), params, outputs


def test_greedy_rows_agree_in_every_variant():
    logits = np.round(random_logits(6, 9000))
    for variant in VARIANTS:
        tokens = run(logits, [SamplingParams(temperature=0.0)] * 6, variant=variant).token_ids
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf] * 9000])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_are_untouched(variant, bad):
    logits, params, outputs = mixed_rows()
    if variant == "greedy":
        params = [replace(p, temperature=0.0) for p in params]
    clean = run(logits, params, outputs=outputs, variant=variant)
    assert clean.ok.all()
    broken = logits.copy()
    hit = np.arange(0, len(params), 2)
    broken[hit, : len(bad)] = bad
    result = run(broken, params, outputs=outputs, variant=variant)
    others = np.setdiff1d(np.arange(len(params)), hit)
    assert not result.ok[hit].any()
    assert result.ok[others].all()
    np.testing.assert_array_equal(result.token_ids[hit], 0)
    np.testing.assert_array_equal(result.token_ids[others], clean.token_ids[others])


@pytest.mark.usefixtures("compiled_as_served")
def test_a_row_s_token_does_not_depend_on_the_batch():
    logits, params, outputs = mixed_rows()
    together = run(logits, params, outputs=outputs).token_ids
    alone = [
        run(logits[i : i + 1], [p], outputs=outputs[i : i + 1], num_rows=1).token_ids[0] for i, p in enumerate(params)
    ]
    np.testing.assert_array_equal(together, alone)
    order = np.random.default_rng(1).permutation(len(params))
    shuffled = run(logits[order], [params[i] for i in order], outputs=[outputs[i] for i in order]).token_ids
    np.testing.assert_array_equal(together[order], shuffled)


@pytest.mark.usefixtures("compiled_as_served")
def test_a_row_s_token_does_not_depend_on_the_variant():
    logits, params, outputs = mixed_rows()
    by_variant = [run(logits, params, outputs=outputs, variant=v).token_ids for v in ("random", "full")]
    np.testing.assert_array_equal(*by_variant)


@pytest.mark.usefixtures("compiled_as_served")  # for its own speed: of 9000 tokens, LLVM's work pays
@pytest.mark.parametrize(
    "params", [MIXES[0], MIXES[9], SamplingParams(top_p=0.9), SamplingParams(top_k=500, top_p=0.5)], ids=str
)
def test_tokens_of_a_large_vocabulary_follow_their_distribution(params):
    logits = random_logits(1, 9000, scale=2.0)[0]
    assert_drawn_from(distribution(logits, params), draws(logits, params, 2048))
