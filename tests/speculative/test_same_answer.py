"""Answers with drafts are those without, token for token: greedy, sampled, penalised, ended early, sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine import drafting
from jaxserve.engine.core import EngineCore
from jaxserve.outputs import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.checkpoints import TINY, save_random_llama
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.speculative.oracle import Oracle
from tests.structured.requests import CONSTRAINTS, constrained

NUM_TOKENS = 24
_rng = np.random.default_rng(11)
PROMPTS = [_rng.integers(3, 320, size).tolist() for size in (1, 5, 16, 33, 70)]
SPECULATIVE = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "adaptive": False}}

LETTERS = grammar_text(StructuredOutputsParams(regex="([a-z]|[A-Z]{2}|[0-9]{3} |..x)*"))

SAMPLED = {
    "temperature": {"temperature": 0.8},
    "top_k": {"top_k": 20},
    "large top_k": {"top_k": 100},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    "repetition": {"repetition_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.4},
    "presence": {"presence_penalty": 0.3},
    "logprobs": {"logprobs": 3},
    "bad words": {"bad_words_token_ids": [[7], [9, 11]]},
    "allowed": {"allowed_token_ids": list(range(5, 60))},
    "grammar": {"structured_outputs_grammar": LETTERS, "temperature": 1.5},
    "grammar and others": {"structured_outputs_grammar": LETTERS, "top_k": 30, "frequency_penalty": 0.3, "logprobs": 2},
    "grammar that ends": {"structured_outputs_grammar": grammar_text(CONSTRAINTS["grammar"]), "top_p": 0.95},
    "all at once": {"temperature": 1.3, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": 0.5, "logprobs": 0},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(save_random_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Iterator[EngineCore]:
    core = EngineCore(tiny_config(str(checkpoint)))
    yield core
    core.shutdown()


@pytest.fixture(scope="module")
def speculative(checkpoint: Path) -> Iterator[Callable[[list[list[int]]], EngineCore]]:
    """An engine that is told the answers before each run."""
    oracle = Oracle([], vocab_size=TINY["vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "NgramProposer", lambda **settings: oracle)
        core = EngineCore(tiny_config(str(checkpoint), **SPECULATIVE))

    def told(sequences: list[list[int]]) -> EngineCore:
        oracle.__init__(sequences, vocab_size=TINY["vocab_size"])
        return core

    yield told
    assert core.stats().num_compiles_after_ready == 0
    assert core.stats().kv_cache_usage == 0
    core.shutdown()


def answers(core: EngineCore, params: list[SamplingParams], salt: str) -> list[list]:
    return run(core, PROMPTS, params, cache_salt=salt)


def check_same(plain: EngineCore, told: Callable, params: list[SamplingParams], salt: str) -> None:
    wanted = answers(plain, params, salt)
    core = told([prompt + tokens(deltas) for prompt, deltas in zip(PROMPTS, wanted, strict=True)])
    before = core.stats().drafts
    given = answers(core, params, salt)
    after = core.stats().drafts
    assert [tokens(deltas) for deltas in given] == [tokens(deltas) for deltas in wanted]
    assert [deltas[-1].finish_reason for deltas in given] == [deltas[-1].finish_reason for deltas in wanted]
    num_accepted = after.num_accepted_tokens - before.num_accepted_tokens
    num_rejected = after.num_draft_tokens - before.num_draft_tokens - num_accepted
    assert num_accepted > 20
    assert num_rejected > 5
    for ours, theirs in zip(given, wanted, strict=True):
        scores = [[entry for delta in deltas for entry in delta.logprobs or ()] for deltas in (ours, theirs)]
        assert [entry.token_id for entry in scores[0]] == [entry.token_id for entry in scores[1]]
        assert [entry.top_token_ids for entry in scores[0]] == [entry.top_token_ids for entry in scores[1]]
        logprobs = [[entry.logprob for entry in entries] for entries in scores]
        np.testing.assert_allclose(*logprobs, atol=1e-4)


def test_greedy_answers_are_the_same(plain, speculative) -> None:
    check_same(plain, speculative, [greedy(NUM_TOKENS)] * len(PROMPTS), "greedy")


@pytest.mark.parametrize("changes", SAMPLED.values(), ids=SAMPLED.keys())
def test_a_seed_gives_the_same_answer_with_drafts_as_without(plain, speculative, changes) -> None:
    params = [
        SamplingParams(**({"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": 100 + index} | changes))
        for index in range(len(PROMPTS))
    ]
    check_same(plain, speculative, params, f"sampled {list(changes)}")


def test_requests_of_all_kinds_side_by_side_are_the_same(plain, speculative) -> None:
    kinds = [{"temperature": 0.0}, *(SAMPLED[name] for name in ("bad words", "allowed", "grammar", "all at once"))]
    params = [
        SamplingParams(**({"max_tokens": NUM_TOKENS - 3 * index, "ignore_eos": True, "seed": 7} | kind))
        for index, kind in enumerate(kinds)
    ]
    check_same(plain, speculative, params, "mixed")


def test_min_tokens_counts_the_drafts_before(plain, speculative) -> None:
    params = [greedy(NUM_TOKENS, min_tokens=3 + index, ignore_eos=False, logit_bias={2: 100.0}) for index in range(5)]
    wanted = answers(plain, params, "min")
    core = speculative([prompt + tokens(deltas) for prompt, deltas in zip(PROMPTS, wanted, strict=True)])
    given = answers(core, params, "min")
    assert [tokens(deltas) for deltas in given] == [tokens(deltas) for deltas in wanted]
    assert [len(tokens(deltas)) for deltas in given] == [4, 5, 6, 7, 8]
    assert {deltas[-1].finish_reason for deltas in given} == {FinishReason.STOP}


def test_drafts_are_accepted_in_one_chunk_of_several_tokens(plain, speculative) -> None:
    params = [greedy(NUM_TOKENS)] * len(PROMPTS)
    wanted = answers(plain, params, "chunks")
    core = speculative([prompt + tokens(deltas) for prompt, deltas in zip(PROMPTS, wanted, strict=True)])
    given = answers(core, params, "chunks")
    assert max(len(delta.token_ids) for deltas in given for delta in deltas) > 3


@pytest.mark.parametrize(
    "changes",
    [
        {"tensor_parallel_size": 2},
        {"data_parallel_size": 2},
        {"num_gpu_blocks_override": 33, "block_size": 4, "max_model_len": 100},
        {"max_num_batched_tokens": 8, "token_buckets": (8,)},
        {"async_scheduling": False, "enable_prefix_caching": False},
    ],
    ids=["two devices", "two data shards", "preempted", "chunked", "synchronous"],
)
def test_greedy_answers_are_the_same_however_the_engine_runs(plain, checkpoint, monkeypatch, changes) -> None:
    params = [greedy(NUM_TOKENS), *(greedy(NUM_TOKENS, frequency_penalty=0.3) for _ in range(2))]
    params += [
        greedy(NUM_TOKENS, structured_outputs_grammar=LETTERS),
        constrained(greedy(NUM_TOKENS), CONSTRAINTS["json"]),
    ]
    wanted = [tokens(deltas) for deltas in answers(plain, params, "ways")]
    oracle = Oracle([prompt + answer for prompt, answer in zip(PROMPTS, wanted, strict=True)], vocab_size=320)
    monkeypatch.setattr(drafting, "NgramProposer", lambda **settings: oracle)
    core = EngineCore(tiny_config(str(checkpoint), **(SPECULATIVE | changes)))
    for _ in range(2):  # the second time, where there is one, from the prefix cache
        assert [tokens(deltas) for deltas in answers(core, params, "ways")] == wanted
    stats = core.stats()
    assert stats.drafts.num_accepted_tokens > 20
    assert stats.num_preemptions > 0 or "num_gpu_blocks_override" not in changes
    assert stats.num_compiles_after_ready == 0
    assert stats.kv_cache_usage == 0
    core.shutdown()
