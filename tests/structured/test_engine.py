"""Grammars in an engine: answers obey them, and requests end well, and badly, without harm to others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine.core import EngineCore
from jaxserve.outputs import FinishReason, TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from jaxserve.tokenizer.tokenizer import Tokenizer
from tests.checkpoints import save_random_llama, transformers_logits
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.structured.requests import CONSTRAINTS, END, PERSON, constrained

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(save_random_llama(tmp_path_factory.mktemp("tiny-llama")))


@pytest.fixture(scope="module")
def core(checkpoint: Path) -> Iterator[EngineCore]:
    core = EngineCore(tiny_config(str(checkpoint), max_queued_requests=20))
    yield core
    assert core.stats().num_compiles_after_ready == 0
    assert core.stats().kv_cache_usage == 0
    core.shutdown()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_source(str(checkpoint))


def sampled(seed: int, num_tokens: int = 80, **changes) -> SamplingParams:
    return SamplingParams(**({"temperature": 1.0, "seed": seed, "max_tokens": num_tokens} | changes))


def text(tokenizer: Tokenizer, deltas: list[TokenDelta]) -> str:
    assert tokens(deltas)[-1] in (2, END)
    return tokenizer.decode(tokens(deltas)[:-1])


def test_sampled_answers_obey_their_grammars_to_the_end(core, tokenizer):
    for seed in range(6):
        each = [constrained(sampled(seed), grammar) for grammar in list(CONSTRAINTS.values())[:4]]
        answers = run(core, [PROMPT] * 4, each)
        assert {deltas[-1].finish_reason for deltas in answers} == {FinishReason.STOP}
        person, letters, choice, brackets = (text(tokenizer, deltas) for deltas in answers)
        assert re.fullmatch(r"[A-Z][a-z]{1,6}", json.loads(person)["name"])
        assert set(json.loads(person)) == set(PERSON["properties"])
        assert re.fullmatch("([a-f]+[0-9] ?){2,5}", letters)
        assert choice in CONSTRAINTS["choice"].choice
        assert set(brackets) <= set("()0123456789")
        assert brackets.count("(") == brackets.count(")") > 0


def test_tokens_of_a_mask_are_drawn_as_often_as_the_model_says(core, checkpoint):
    from scipy.stats import chisquare

    letters = [ord(letter) for letter in "abcdefgh"]
    ids = [Tokenizer.from_source(str(checkpoint)).encode(chr(letter))[0] for letter in letters]
    logits = transformers_logits(checkpoint, PROMPT)[-1, ids].astype(np.float64) / 2
    wanted = np.exp(logits - logits.max())
    grammar = constrained(sampled(0, 1, temperature=2.0), StructuredOutputsParams(regex="[a-h]+"))
    answers = []
    for begin in range(0, 1000, 20):
        each = [replace(grammar, seed=seed) for seed in range(begin, begin + 20)]
        answers += [tokens(deltas)[0] for deltas in run(core, [PROMPT] * 20, each)]
    counts = [answers.count(token_id) for token_id in ids]
    assert sum(counts) == 1000
    assert chisquare(counts, wanted / wanted.sum() * 1000).pvalue > 0.001


def test_a_mask_goes_with_what_else_a_request_allows(core, tokenizer):
    digits = [tokenizer.encode(digit)[0] for digit in "123"]
    grammar = StructuredOutputsParams(regex="[0-9]{4}")
    (deltas,) = run(core, [PROMPT], [constrained(greedy(9, allowed_token_ids=[*digits, 2, 40]), grammar)])
    assert re.fullmatch("[123]{4}", text(tokenizer, deltas))


def test_logprobs_are_of_the_model_and_not_of_the_mask(core, checkpoint):
    (deltas,) = run(core, [PROMPT], [constrained(greedy(1, logprobs=2), CONSTRAINTS["regex"])])
    (entry,) = deltas[0].logprobs
    logits = transformers_logits(checkpoint, PROMPT)[-1].astype(np.float64)
    raw = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    np.testing.assert_allclose(entry.logprob, raw[entry.token_id], atol=1e-4)
    assert entry.rank > 1
    assert entry.top_token_ids[0] == logits.argmax()


def test_a_row_whose_grammar_is_too_much_ends_with_an_error_and_others_go_on(core, tokenizer):
    large = constrained(greedy(100), StructuredOutputsParams(regex="((a{0,100}){0,100}){0,100}"))
    # What the limit stops is the way of many steps; "a" is all there is to say, and the end is forbidden.
    failing, going_on, plain = run(
        core, [PROMPT] * 3, [replace(large, min_tokens=100), constrained(sampled(1), CONSTRAINTS["json"]), greedy(30)]
    )
    assert failing[-1].finish_reason is FinishReason.ERROR
    assert "structured_outputs: " in failing[-1].error
    assert json.loads(text(tokenizer, going_on))["tags"]
    assert len(tokens(plain)) == 30


def test_a_request_that_may_not_end_and_has_nothing_more_to_say_fails_alone(core):
    never = constrained(greedy(20, min_tokens=15), StructuredOutputsParams(choice=["yes"]))
    failing, plain = run(core, [PROMPT, PROMPT], [never, greedy(20)])
    assert failing[-1].finish_reason is FinishReason.ERROR
    assert "min_tokens" in failing[-1].error
    assert len(tokens(plain)) == 20


def test_without_an_end_of_text_the_answer_stays_ended(core):
    grammar = constrained(greedy(12), StructuredOutputsParams(choice=["yes"]))
    (deltas,) = run(core, [PROMPT], [replace(grammar, ignore_eos=True, stop_token_ids=None)])
    assert len(tokens(deltas)) == 12
    assert set(tokens(deltas)[3:]) <= {2, END}


def test_requests_wait_for_their_grammar_and_can_be_aborted_meanwhile(checkpoint):
    core = EngineCore(tiny_config(str(checkpoint), max_queued_requests=3))
    names = [f"n{i}" for i in range(60)]
    large = {"properties": {name: {"enum": names} for name in names}, "required": names}
    params = constrained(greedy(5), StructuredOutputsParams(json=large, disable_any_whitespace=True))
    for name in ("kept", "left"):
        core.add_request(EngineRequest(request_id=name, prompt_token_ids=PROMPT, sampling_params=params))
    assert core.stats().num_waiting == 2
    (ended,) = core.abort(["left"])
    assert (ended.request_id, ended.finish_reason) == ("left", FinishReason.ABORT)
    deltas = []
    while core.has_unfinished:
        deltas += core.step()
    assert {delta.request_id for delta in deltas} == {"kept"}
    assert len(tokens(deltas)) == 5
    core.shutdown()


def test_an_engine_without_a_tokenizer_refuses_the_request_and_serves_others(tmp_path):
    core = EngineCore(tiny_config(str(save_random_llama(tmp_path))))
    failing, plain = run(core, [PROMPT] * 2, [constrained(greedy(5), CONSTRAINTS["choice"]), greedy(5)])
    assert failing[-1].finish_reason is FinishReason.ERROR
    assert "cannot be compiled" in failing[-1].error
    assert len(tokens(plain)) == 5
    core.shutdown()
