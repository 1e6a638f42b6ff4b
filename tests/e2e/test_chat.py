"""Chats over HTTP with OpenAI's own client: whole and streamed, log-probabilities, seeds, stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.e2e.server import NAME

RIVERS: Any = [{"role": "user", "content": "Name three rivers."}]
GREEDY: dict[str, Any] = {"model": NAME, "messages": RIVERS, "temperature": 0}


def stream(client: OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(**(GREEDY | fields), stream=True))


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = (choice for chunk in chunks for choice in chunk.choices)
    return "".join(choice.delta.content or "" for choice in choices if choice.index == index)


@pytest.fixture(scope="module")
def greedy(client: OpenAI) -> ChatCompletion:
    """The greedy answer's first 24 tokens, with log-probabilities."""
    return client.chat.completions.create(**GREEDY, max_tokens=24, logprobs=True, top_logprobs=3)


@pytest.fixture(scope="module")
def greedy_text(greedy: ChatCompletion) -> str:
    text = greedy.choices[0].message.content
    assert text is not None and len(text) > 40
    return text


def test_a_chat_is_answered_in_openai_form(greedy, greedy_text):
    assert greedy.id.startswith("chatcmpl-")
    assert greedy.model == NAME
    assert greedy.choices[0].message.role == "assistant"
    assert greedy.choices[0].finish_reason == "length"
    assert greedy.usage.completion_tokens == 24
    assert greedy.usage.total_tokens == greedy.usage.prompt_tokens + 24


def test_a_stream_says_the_same_and_its_last_chunk_counts_tokens(client, greedy, greedy_text):
    chunks = stream(client, max_tokens=24, stream_options={"include_usage": True})
    assert text_of(chunks) == greedy_text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert len(chunks) > 12  # it came bit by bit
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens == greedy.usage.prompt_tokens


def test_log_probabilities_spell_the_answer_and_lead_with_the_chosen_token(greedy, greedy_text):
    entries = greedy.choices[0].logprobs.content
    assert len(entries) == 24
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == greedy_text
    for entry in entries:
        top = [alternative.logprob for alternative in entry.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.logprob <= 0


def test_streamed_log_probabilities_are_those_of_the_whole_answer(client, greedy):
    chunks = stream(client, max_tokens=24, logprobs=True, top_logprobs=3)
    streamed = [
        entry for chunk in chunks for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    whole = greedy.choices[0].logprobs.content
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)


def test_a_seed_makes_three_answers_reproducible_and_each_choice_can_be_replayed(client):
    fields = GREEDY | {"temperature": 1.0, "max_tokens": 8}
    first, second = (client.chat.completions.create(**fields, n=3, seed=2**63 + 11) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert [choice.message.content for choice in second.choices] == texts
    assert len(set(texts)) == 3
    assert first.usage.completion_tokens == 24
    for choice in first.choices:
        replayed = client.chat.completions.create(**fields, seed=choice.seed)
        assert replayed.choices[0].message.content == choice.message.content


def test_an_answer_without_a_seed_names_the_seed_that_replays_it(client):
    fields = GREEDY | {"temperature": 1.0, "max_tokens": 8}
    answers = [client.chat.completions.create(**fields).choices[0] for _ in range(2)]
    assert answers[0].seed != answers[1].seed
    replayed = client.chat.completions.create(**fields, seed=answers[0].seed).choices[0]
    assert replayed.message.content == answers[0].message.content


def test_streamed_choices_are_the_whole_ones(client):
    fields = GREEDY | {"temperature": 0.8, "top_p": 0.9, "max_tokens": 10, "n": 2, "seed": 5}
    whole = client.chat.completions.create(**fields)
    chunks = stream(client, **fields)
    assert [text_of(chunks, index) for index in range(2)] == [choice.message.content for choice in whole.choices]


def spanning(entries: list[Any], first: int) -> str:
    """A stop string that begins inside one token's text and ends inside the next but one."""
    return entries[first].token[1:] + entries[first + 1].token + entries[first + 2].token[:-1]


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("keep", [False, True], ids=["cut", "kept"])
def test_a_stop_string_across_tokens_ends_the_answer(client, greedy, greedy_text, streams, keep):
    stop = spanning(greedy.choices[0].logprobs.content, 8)
    assert len(stop) > 3
    cut = greedy_text.index(stop) + (len(stop) if keep else 0)
    fields = {"max_tokens": 24, "stop": ["never said", stop], "extra_body": {"include_stop_str_in_output": keep}}
    if streams:
        chunks = stream(client, **fields)
        text, end = text_of(chunks), next(c for chunk in chunks for c in chunk.choices if c.finish_reason)
    else:
        end = client.chat.completions.create(**GREEDY, **fields).choices[0]
        text = end.message.content
    assert text == greedy_text[:cut]
    assert (end.finish_reason, end.stop_reason) == ("stop", stop)


def test_text_that_only_looks_like_a_stop_string_is_not_lost(client, greedy_text):
    stops = [greedy_text[10:20] + "#", greedy_text[-6:] + "#"]
    assert text_of(stream(client, max_tokens=24, stop=stops)) == greedy_text


def test_max_completion_tokens_is_the_newer_name_of_max_tokens(client, greedy_text):
    answer = client.chat.completions.create(**GREEDY, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4
    assert greedy_text.startswith(answer.choices[0].message.content)


def test_a_conversation_of_all_roles_and_text_parts_is_rendered(client):
    answer = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "system", "content": "Answer with one word."},
            {"role": "user", "content": [{"type": "text", "text": "Ça va ? 😀"}]},
            {"role": "assistant", "content": "Oui."},
            {"role": "user", "content": "What is 2+2?"},
        ],
        max_tokens=3,
        temperature=0,
    )
    assert answer.usage.completion_tokens == 3


def test_a_model_that_ends_by_itself_says_stop(client):
    answer = client.chat.completions.create(**GREEDY, max_tokens=8, logit_bias={"2": 100})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
