"""Text completions with OpenAI's own client: shapes of prompts, echo, sampling rules, scores, the prefix cache."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.server import MAX_MODEL_LEN, NAME

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 8}
EOS = 2


@pytest.fixture(scope="module")
def prompt_ids(http) -> list[int]:
    return http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    return client.completions.create(prompt=prompt, **(GREEDY | fields))


def text(client: OpenAI, **extra: Any) -> str:
    return complete(client, extra_body=extra).choices[0].text


def test_text_and_its_tokens_are_the_same_prompt(client, prompt_ids):
    by_text, by_tokens = complete(client), complete(client, prompt_ids)
    assert by_text.choices[0].text.startswith(" Paris")
    assert by_tokens.choices[0].text == by_text.choices[0].text
    assert by_tokens.usage.prompt_tokens == by_text.usage.prompt_tokens == len(prompt_ids)


def test_several_prompts_are_answered_in_their_order(client, prompt_ids):
    others = [prompt_ids[:3], prompt_ids, prompt_ids[:4]]
    alone = [complete(client, prompt).choices[0].text for prompt in others]
    together = complete(client, others, n=2)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [answer for answer in alone for _ in range(2)]
    texts = complete(client, [PROMPT, "1, 2, 3, 4,"])
    assert texts.choices[0].text == alone[1]
    assert texts.choices[1].text.startswith(" 5, 6")


def test_streamed_prompts_are_the_whole_ones(client):
    fields = GREEDY | {"prompt": [PROMPT, "1, 2, 3, 4,"]}
    whole = client.completions.create(**fields)
    texts = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_echo_and_logprobs_score_the_prompt_before_the_answer(client, prompt_ids):
    choice = complete(client, echo=True, logprobs=2).choices[0]
    scores = choice.logprobs
    assert choice.text.startswith(PROMPT + " Paris")
    assert "".join(scores.tokens) == choice.text
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt_ids) + 8
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(value < 0 for value in scores.token_logprobs[1:])
    assert [choice.text[at : at + len(token)] for at, token in zip(scores.text_offset, scores.tokens, strict=True)] == (
        scores.tokens
    )
    assert scores.top_logprobs[len(prompt_ids)].keys() >= {" Paris", " the"}


def test_echo_without_tokens_scores_the_prompt_alone(client, prompt_ids):
    answer = complete(client, max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.token_logprobs) == len(prompt_ids)
    assert answer.usage.completion_tokens == 0


def test_prompt_logprobs_agree_with_echo(client, prompt_ids):
    echoed = complete(client, echo=True, logprobs=0, max_tokens=1).choices[0].logprobs.token_logprobs
    scored = complete(client, max_tokens=1, extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert scored[0] is None
    own = [entry[str(token)] for entry, token in zip(scored[1:], prompt_ids[1:], strict=True)]
    assert [entry["logprob"] for entry in own] == pytest.approx(echoed[1 : len(prompt_ids)], abs=1e-4)
    assert own[0]["decoded_token"] == " capital" and own[0]["rank"] > 2
    assert all(len(entry) in (2, 3) for entry in scored[1:])


def test_the_second_call_takes_its_prompt_from_the_prefix_cache(client):
    prompt = "A lighthouse keeper wrote a letter every evening and gave it to the sea. " * 4
    first, second = complete(client, prompt), complete(client, prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text


def test_a_cache_salt_keeps_prompts_apart(client):
    prompt = "Nobody but the owner of this salt may find out that the prompt was sent before. " * 3
    usages = {}
    for salt in ("a", "b", "a"):
        usage = complete(client, prompt, max_tokens=1, extra_body={"cache_salt": salt}).usage
        usages.setdefault(salt, []).append(usage.prompt_tokens_details.cached_tokens)
    assert usages["b"] == [0]
    assert usages["a"][0] == 0 and usages["a"][1] > 0


def test_an_end_of_text_ends_unless_it_is_ignored_or_too_early(client):
    wants_eos = {"logit_bias": {str(EOS): 100}}
    for extra, tokens, reason in [
        ({}, 1, "stop"),
        ({"ignore_eos": True}, 8, "length"),
        ({"min_tokens": 5}, 6, "stop"),
    ]:
        answer = complete(client, extra_body=wants_eos | extra)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (tokens, reason), extra


def test_a_stop_token_ends_the_answer_and_is_named(client, http):
    paris = http.post("/tokenize", json={"prompt": " Paris"}).json()["tokens"]
    choice = complete(client, extra_body={"stop_token_ids": paris}).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", paris[0])


def test_a_bias_forces_and_forbids_tokens(client, http):
    paris, london = (
        http.post("/tokenize", json={"prompt": word}).json()["tokens"][0] for word in (" Paris", " London")
    )
    assert text(client, logit_bias={str(london): 100}, max_tokens=2) == " London London"
    assert not text(client, logit_bias={str(paris): -100}).startswith(" Paris")


def test_only_allowed_tokens_are_chosen(client, http):
    allowed = [
        http.post("/tokenize", json={"prompt": word}).json()["tokens"][0] for word in (" Rome", " Oslo", " Lima")
    ]
    extra = {"allowed_token_ids": allowed, "temperature": 1.0, "return_token_ids": True}
    assert set(complete(client, extra_body=extra).choices[0].token_ids) <= set(allowed)


def test_bad_words_are_not_said(client):
    assert " Paris" in text(client)
    said = text(client, bad_words=["Paris", "the"])
    assert "Paris" not in said and " the" not in said


def test_truncated_prompts_keep_their_end(client, prompt_ids):
    whole = complete(client, prompt_ids[-3:])
    cut = complete(client, extra_body={"truncate_prompt_tokens": 3})
    assert cut.usage.prompt_tokens == 3
    assert cut.choices[0].text == whole.choices[0].text


def test_a_prompt_may_fill_the_context_and_the_answer_ends_there(client):
    long = [504] * 700
    answer = complete(client, long, max_tokens=4, extra_body={"truncate_prompt_tokens": -1, "ignore_eos": True})
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "word " * 470}],
        extra_body={"ignore_eos": True},
        temperature=0,
    )
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"


def test_top_k_one_is_greedy_whatever_the_temperature(client):
    assert text(client, temperature=5.0, top_k=1) == text(client)


def test_penalties_change_what_is_said(client):
    repeated = complete(client, "no no no no no no no no", max_tokens=6)
    punished = complete(client, "no no no no no no no no", max_tokens=6, extra_body={"repetition_penalty": 5.0})
    assert repeated.choices[0].text != punished.choices[0].text
    assert " no" not in punished.choices[0].text
