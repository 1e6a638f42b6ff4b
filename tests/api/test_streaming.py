"""Streams: golden transcripts, order of chunks, usage, echo, and errors in the middle."""

from __future__ import annotations

import json
import re

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from jaxserve.errors import EngineDeadError, QueueFullError
from tests.fakes import FakeEngine

USER = [{"role": "user", "content": "Hi"}]


def transcript(client: TestClient, path: str, **fields) -> str:
    response = client.post(path, json={"stream": True} | fields, headers={"x-request-id": "req"})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return re.sub(r'"created":\d+', '"created":0', response.text)


def events(text: str) -> list:
    lines = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def streamed(client: TestClient, path: str, **fields) -> list:
    return events(transcript(client, path, **fields))


GOLDEN_CHAT = """\
data: {"id":"chatcmpl-req","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-req","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[{"index":0,"delta":{"content":"He"},"logprobs":null,"finish_reason":null}]}

data: {"id":"chatcmpl-req","object":"chat.completion.chunk","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[{"index":0,"delta":{"content":"llo"},"logprobs":null,"finish_reason":"length","stop_reason":null,"seed":7}]}

data: [DONE]

"""

GOLDEN_COMPLETION = """\
data: {"id":"cmpl-req","object":"text_completion","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[{"index":0,"text":"He","logprobs":null,"finish_reason":null}],"usage":null}

data: {"id":"cmpl-req","object":"text_completion","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[{"index":0,"text":"llo","logprobs":null,"finish_reason":"length","stop_reason":null,"seed":7}],"usage":null}

data: {"id":"cmpl-req","object":"text_completion","created":0,"model":"fake","system_fingerprint":"fp_fake",\
"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3,\
"prompt_tokens_details":{"cached_tokens":0}}}

data: [DONE]

"""


def test_a_chat_stream_reads_like_this(client: TestClient) -> None:
    assert transcript(client, "/v1/chat/completions", messages=USER, max_tokens=2) == GOLDEN_CHAT


def test_a_completion_stream_with_usage_reads_like_this(client: TestClient) -> None:
    text = transcript(client, "/v1/completions", prompt=[5], max_tokens=2, stream_options={"include_usage": True})
    assert text == GOLDEN_COMPLETION


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_chunks_of_each_choice_add_up_to_its_whole_text(client: TestClient, path: str) -> None:
    prompt = {"prompt": "One"} if path == "/v1/completions" else {"messages": USER}
    whole = client.post(path, json={"n": 3, "max_tokens": 50} | prompt).json()
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    for chunk in streamed(client, path, n=3, max_tokens=50, **prompt):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            reasons[choice["index"]] = choice["finish_reason"]
    expected = [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
    assert list(texts.values()) == expected
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}


def test_several_prompts_stream_side_by_side_under_their_own_indices(client: TestClient) -> None:
    chunks = streamed(client, "/v1/completions", prompt=["One", "two"], n=2, max_tokens=50)
    indices = [chunk["choices"][0]["index"] for chunk in chunks]
    assert set(indices) == {0, 1, 2, 3}
    assert indices != sorted(indices)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"][0]["index"] == 3)
    assert text == "1: Hello world, how are you today?"


def test_usage_so_far_can_stand_in_every_chunk(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(client, "/v1/chat/completions", messages=USER, max_tokens=3, stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3]


def test_nulls_in_stream_options_count_as_not_given(client: TestClient) -> None:
    chunks = streamed(client, "/v1/completions", prompt="One", stream_options={"include_usage": None})
    assert "usage" not in chunks[0]


def test_chat_logprobs_come_with_their_tokens(client: TestClient) -> None:
    chunks = streamed(client, "/v1/chat/completions", messages=USER, max_tokens=3, logprobs=True, top_logprobs=1)
    tokens = [entry["token"] for c in chunks[1:] for entry in c["choices"][0]["logprobs"]["content"]]
    assert tokens == ["He", "llo", " wor"]


def test_streamed_completion_logprobs_equal_the_whole_ones(client: TestClient) -> None:
    fields = {"prompt": "Hello", "max_tokens": 3, "logprobs": 2, "echo": True}
    whole = client.post("/v1/completions", json=fields).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in streamed(client, "/v1/completions", **fields)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_a_streamed_prompt_can_be_scored_alone(client: TestClient) -> None:
    chunks = streamed(client, "/v1/completions", prompt="Hello", max_tokens=0, logprobs=0, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_text_that_comes_before_the_prompts_scores_waits_for_them() -> None:
    engine = FakeEngine(scores_prompt_late=True)
    client = TestClient(create_app(engine, ServerSettings()))
    fields = {"prompt": "Hello", "max_tokens": 4, "logprobs": 1, "echo": True}
    whole = client.post("/v1/completions", json=fields).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in streamed(client, "/v1/completions", **fields)]
    assert chunks[0]["text"] == "Hello"
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[0]["logprobs"]["token_logprobs"] == [None, -0.25]


def test_token_ids_come_with_the_first_chunk_and_with_each_text(client: TestClient, engine: FakeEngine) -> None:
    chunks = streamed(client, "/v1/completions", prompt=[5, 6], max_tokens=2, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == [5, 6]
    assert [choice.get("token_ids") for choice in choices[1:]] == [[t] for t in engine.tokenizer.encode("Hello", False)]


def test_a_character_split_over_tokens_survives(client: TestClient) -> None:
    client = TestClient(create_app(FakeEngine(answer='say "hi"\n\x00\u2028'), ServerSettings()))
    chunks = streamed(client, "/v1/completions", prompt="One", max_tokens=50)
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text.startswith('say "hi"\n\x00')


def test_an_error_before_the_first_token_is_an_ordinary_error() -> None:
    client = TestClient(create_app(FakeEngine(error=QueueFullError("full", retry_after_s=3)), ServerSettings()))
    response = client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_an_error_in_the_middle_is_an_event_that_ends_the_stream() -> None:
    client = TestClient(create_app(FakeEngine(error=EngineDeadError(), error_after=2), ServerSettings()))
    response = client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    assert response.status_code == 200
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_dead"
    assert "[DONE]" not in response.text


def test_an_unforeseen_error_in_the_middle_tells_nothing_of_the_inside() -> None:
    client = TestClient(create_app(FakeEngine(error=ValueError("secret"), error_after=2), ServerSettings()))
    response = client.post("/v1/chat/completions", json={"messages": USER, "stream": True})
    assert "secret" not in response.text
    assert json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["type"] == "server_error"


def test_the_first_error_of_several_prompts_ends_them_all() -> None:
    engine = FakeEngine(error=EngineDeadError(), error_after=1)
    client = TestClient(create_app(engine, ServerSettings()))
    response = client.post("/v1/completions", json={"prompt": ["One", "two", "three"], "stream": True})
    assert '"engine_dead"' in response.text
    assert not engine.running
