"""Text with drafts: stop strings and max_tokens cut accepted drafts where plain decoding would have ended."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config import Config
from jaxserve.engine import drafting
from jaxserve.outputs import RequestOutput
from tests.checkpoints import TINY, save_random_llama
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import tiny_config
from tests.speculative.oracle import Oracle

PROMPT = "the quick brown fox"
SPECULATIVE = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 6, "adaptive": False}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = save_random_llama(tmp_path_factory.mktemp("tiny-llama"))
    return tiny_config(str(write_tokenizer(folder)), **SPECULATIVE)


@pytest.fixture(scope="module")
def llms(config: Config) -> Iterator[tuple[LLM, Callable[[list[int]], LLM]]]:
    """A plain one, and one that knows the answer it is told and guesses it without a mistake."""
    oracle = Oracle([], vocab_size=TINY["vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafting, "NgramProposer", lambda **settings: oracle)
        speculative = LLM(config=config)

    def told(sequence: list[int]) -> LLM:
        oracle.__init__([sequence], vocab_size=TINY["vocab_size"], wrong=0.0)
        return speculative

    with LLM(config=config.with_values(speculative_config=None)) as plain, speculative:
        yield plain, told


def letters(llm: LLM, **changes) -> SamplingParams:
    """Parameters under which the model writes letters."""
    allowed = llm.get_tokenizer().encode(string.ascii_lowercase, False)
    return SamplingParams(**({"max_tokens": 30, "seed": 3, "allowed_token_ids": allowed} | changes))


def generate(llm: LLM, params: SamplingParams) -> RequestOutput:
    return llm.generate(PROMPT, params, use_tqdm=False)[0]


def test_a_stop_string_ends_the_text_wherever_in_the_drafts_it_is_complete(llms) -> None:
    plain, told = llms
    whole = generate(plain, letters(plain))
    llm = told(whole.prompt_token_ids + whole.outputs[0].token_ids)
    text = whole.outputs[0].text
    assert generate(llm, letters(plain)).outputs[0].text == text
    assert len(text) == 30
    for place in range(1, 28):
        for included in (False, True):
            params = letters(plain, stop=[text[place : place + 3]], include_stop_str_in_output=included)
            wanted, given = generate(plain, params).outputs[0], generate(llm, params).outputs[0]
            assert given == wanted


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_max_tokens_holds_in_the_middle_of_drafts(llms, max_tokens) -> None:
    plain, told = llms
    whole = generate(plain, letters(plain))
    llm = told(whole.prompt_token_ids + whole.outputs[0].token_ids)
    params = letters(plain, max_tokens=max_tokens, logprobs=2)
    wanted, given = generate(plain, params).outputs[0], generate(llm, params).outputs[0]
    assert (given.text, given.token_ids, given.finish_reason) == (wanted.text, wanted.token_ids, wanted.finish_reason)
    assert [entry.token_id for entry in given.logprobs or ()] == wanted.token_ids
    assert given.text_offsets == wanted.text_offsets
