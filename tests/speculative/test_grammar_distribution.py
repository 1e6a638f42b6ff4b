"""Under a grammar, drafts change neither what tokens are drawn from nor, with a seed, which are drawn."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.engine import drafting
from jaxserve.engine.core import EngineCore
from jaxserve.sampling_params import SamplingParams
from jaxserve.speculative.proposer import Proposal
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.tokenizer import Tokenizer
from tests.checkpoints import save_random_llama, transformers_logits
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import run, tiny_config, tokens
from tests.sampling.distribution import assert_drawn_from, distribution
from tests.structured.requests import EOS_IDS, constrained

NUM_SEEDS = 500
# What may come second depends on the first, and so, where that is a draft, on the draft.
SECOND = {"a": "abcd", "b": "cdef", "c": "ac", "d": "bcde"}
GRAMMAR = StructuredOutputsParams(regex="|".join(f"{first}[{second}]" for first, second in SECOND.items()))


class RandomLetters:
    """Guesses letters of which some are forbidden, some right, and some neither; or nothing, while it is silent."""

    def __init__(self, ids: list[int]) -> None:
        self.is_silent = False
        self._ids = ids
        self._random = random.Random(0)

    def propose(self, request_id: str, token_ids: list[int], num_tokens: int) -> Proposal | None:
        return None if self.is_silent else Proposal(self._random.choices(self._ids, k=num_tokens), 1)

    def release(self, request_id: str) -> None:
        pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(save_random_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="module")
def ids(checkpoint: Path) -> dict[str, int]:
    """Of the letters' tokens."""
    tokenizer = Tokenizer.from_source(str(checkpoint))
    return {letter: tokenizer.encode(letter)[0] for letter in string.ascii_lowercase}


@pytest.fixture(scope="module")
def proposer(ids: dict[str, int]) -> RandomLetters:
    return RandomLetters([ids[letter] for letter in "abcdef"])


@pytest.fixture(scope="module")
def core(checkpoint: Path, proposer: RandomLetters) -> Iterator[EngineCore]:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "adaptive": False}
    rows = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "token_buckets": (512,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "NgramProposer", lambda **settings: proposer)
        core = EngineCore(
            tiny_config(str(checkpoint), speculative_config=speculative, max_queued_requests=NUM_SEEDS, **rows)
        )
    yield core
    assert core.stats().num_compiles_after_ready == 0
    core.shutdown()


def prompt(ids: dict[str, int]) -> list[int]:
    """Two letters of the answer are in it, so that it matters to a repetition penalty."""
    return [5, ids["b"], ids["c"], 7]


def ruled(
    logits: np.ndarray, allowed: list[int], history: list[int], output: list[int], params: SamplingParams
) -> np.ndarray:
    """f64[vocab]: what is left of the logits: tokens that are allowed, with their bias, less penalties."""
    left = np.full(len(logits), -np.inf)
    left[allowed] = logits[allowed]
    for token_id, bias in (params.logit_bias or {}).items():
        left[token_id] += bias
    seen = [token_id for token_id in set(history + output) if np.isfinite(left[token_id])]
    left[seen] = np.where(
        left[seen] > 0, left[seen] / params.repetition_penalty, left[seen] * params.repetition_penalty
    )
    for token_id in set(output):
        left[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    return left


def pair_distribution(checkpoint: Path, ids: dict[str, int], params: SamplingParams) -> dict[tuple[int, int], float]:
    """Probability of each answer of two tokens."""
    own = params.allowed_token_ids or list(range(320))

    def of_next(output: list[int], letters: str) -> np.ndarray:
        allowed = [ids[letter] for letter in letters if ids[letter] in own]
        logits = transformers_logits(checkpoint, prompt(ids) + output)[-1].astype(np.float64)
        return distribution(ruled(logits, allowed, prompt(ids), output, params), params)

    first = of_next([], "".join(SECOND))
    return {
        (ids[one], ids[other]): first[ids[one]] * second[ids[other]]
        for one, letters in SECOND.items()
        if first[ids[one]] > 0
        for second in [of_next([ids[one]], letters)]
        for other in letters
    }


MIXES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.0},
    "top_k": {"top_k": 3, "temperature": 3.0},
    "top_p": {"top_p": 0.8, "temperature": 3.0},
    "min_p": {"min_p": 0.4, "temperature": 3.0},
    "repetition": {"repetition_penalty": 1.8, "temperature": 2.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 2.0},
    "presence": {"presence_penalty": -1.5, "temperature": 2.0},
    "logit_bias": {"logit_bias": {"a": 2.0, "d": -1.0, "c": 1.5}, "temperature": 2.0},
    "allowed": {"allowed_token_ids": "acd", "temperature": 2.0},
    "all at once": {
        "temperature": 3.0,
        "top_k": 3,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "logit_bias": {"b": 1.0},
    },
}


def sampling_params(mix: dict[str, Any], ids: dict[str, int]) -> SamplingParams:
    """Of one mix, its letters as tokens."""
    values = {"max_tokens": 3} | mix
    if "logit_bias" in mix:
        values["logit_bias"] = {ids[letter]: bias for letter, bias in mix["logit_bias"].items()}
    if "allowed_token_ids" in mix:
        values["allowed_token_ids"] = [ids[letter] for letter in mix["allowed_token_ids"]] + EOS_IDS
    return constrained(SamplingParams(**values), GRAMMAR)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_what_the_grammar_allows_is_drawn_as_often_as_without_drafts(core, checkpoint, ids, proposer, mix) -> None:
    params = sampling_params(mix, ids)
    wanted = pair_distribution(checkpoint, ids, params)
    seeded = [replace(params, seed=seed) for seed in range(NUM_SEEDS)]
    given = []
    before = core.stats().drafts
    for is_silent in (False, True):
        proposer.is_silent = is_silent
        given.append([tokens(deltas) for deltas in run(core, [prompt(ids)] * NUM_SEEDS, seeded)])
    assert given[0] == given[1]
    after = core.stats().drafts
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert NUM_SEEDS / 10 < num_accepted < after.num_draft_tokens - before.num_draft_tokens - NUM_SEEDS / 10
    assert all(answer[2] in EOS_IDS for answer in given[0])
    pairs = list(wanted)
    assert len([pair for pair in pairs if wanted[pair] > 0]) > 3
    assert_drawn_from(
        np.array([wanted[pair] for pair in pairs]), np.array([pairs.index(tuple(answer[:2])) for answer in given[0]])
    )
