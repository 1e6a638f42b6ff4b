"""Whatever is wrong with a request: the right status, OpenAI's form, one clear sentence."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from jaxserve.engine.client import EngineHealth, EngineState
from jaxserve.errors import QueueFullError, RequestFailedError
from tests.fakes import FakeEngine

USER = [{"role": "user", "content": "Hi"}]
JSON = {"content-type": "application/json"}


def error_of(response, status: int):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


WRONG_BODIES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "must be a JSON object, got a list"),
    (b'"x"', "must be a JSON object, got a string"),
    (b"NaN", "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8: invalid start byte, byte 12"),
    (b'{"prompt": "a"} {"temperature": NaN}', "not valid JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"temperature": NaN, "prompt": "' + b"a" * 100_000 + b'"}', "not valid JSON"),
]


@pytest.mark.parametrize(
    ("body", "part"), WRONG_BODIES, ids=[part + str(i) for i, (_, part) in enumerate(WRONG_BODIES)]
)
def test_a_body_that_is_no_json_object_is_refused(client: TestClient, body: bytes, part: str) -> None:
    error = error_of(client.post("/v1/completions", content=body, headers=JSON), 400)
    assert part in error["message"]
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (b'"temperature": NaN', "temperature", "a number that is finite"),
        (b'"temperature": -Infinity', "temperature", "a number that is finite"),
        (b'"temperature": 1e999', "temperature", "a number that is finite"),
        (b'"logit_bias": {"7": 1e999}', "logit_bias.7", "a number that is finite"),
        (b'"n": ' + b"1" * 5000, "n", "a number that is finite"),
        (b'"stop": ["a", "\\ud800"]', "stop[1]", "half of a surrogate pair"),
        (b'"extra": {"\\udfff": NaN}', "extra", "half of a surrogate pair"),
        (b'"\\udfff": 5', None, "half of a surrogate pair"),
    ],
)
def test_a_value_that_cannot_be_read_is_named_by_its_field(client: TestClient, fields: bytes, param, words) -> None:
    error = error_of(client.post("/v1/completions", content=b'{"prompt": "a", ' + fields + b"}", headers=JSON), 400)
    assert error["param"] == param
    assert words in error["message"]


WRONG_FIELDS = [
    ({}, "prompt", "prompt is required"),
    ({"prompt": []}, "prompt", "prompt must not be an empty list"),
    ({"prompt": ""}, "prompt", "prompt must not be empty"),
    ({"prompt": [""]}, "prompt", "prompt must not be empty"),
    ({"prompt": [[]]}, "prompt", "prompt must not be empty"),
    ({"prompt": [1, "a"]}, "prompt", "must be a string, a list of strings"),
    ({"prompt": [True]}, "prompt", "must be a string, a list of strings"),
    ({"prompt": 5}, "prompt", "must be a string, a list of strings"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": [10**30]}, "prompt", "the vocabulary has 0 to"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts"),
    ({"prompt": ["a"] * 1024, "n": 2}, "n", "more than 1024 sequences"),
    ({"prompt": "a", "tempreature": 1}, "tempreature", "did you mean 'temperature'?"),
    ({"prompt": "a", "zzz": 1}, "zzz", "unknown field 'zzz'"),
    ({"prompt": "a", "temperature": "hot"}, "temperature", 'must be a number, got the string "hot"'),
    ({"prompt": "a", "temperature": True}, "temperature", "must be a number, got the boolean true"),
    ({"prompt": "a", "temperature": -1}, "temperature", "from 0 to 100"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", "must be an integer, got the boolean true"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "must be an integer, got the number 1.5"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens must be an integer from 1"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "or 0 with echo=true"),
    ({"prompt": "a", "max_tokens": 5000}, "prompt", "model takes"),
    ({"prompt": "a", "n": 0}, "n", "n must be an integer from 1"),
    ({"prompt": "a", "top_p": 0}, "top_p", "top_p"),
    ({"prompt": "a", "top_k": -2}, "top_k", "top_k"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "must be an integer"),
    ({"prompt": "a", "seed": -(2**63) - 1}, "seed", "seed"),
    ({"prompt": "a", "stop": [""]}, "stop", "1 to 1024 characters"),
    ({"prompt": "a", "stop": [1]}, "stop[0]", "must be a string, got the integer 1"),
    ({"prompt": "a", "stop_token_ids": [999999]}, "stop_token_ids", "the vocabulary has"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "token ids as keys"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "the vocabulary has"),
    ({"prompt": "a", "stream_options": {}}, "stream_options", "needs stream=true"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
    (
        {"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "is not supported",
    ),
    ({"prompt": "a", "request_id": "two\nlines"}, "request_id", "request_id"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt", "cache_salt"),
    ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
    ({"prompt": "a", "metadata": {"a": [[[[[[]]]]]]} | {"b": 1}, "n": 200}, "n", "n must be"),
]


@pytest.mark.parametrize(("body", "param", "part"), WRONG_FIELDS, ids=[str(i) for i in range(len(WRONG_FIELDS))])
def test_a_wrong_field_is_named_with_what_is_wanted(client: TestClient, body, param: str, part: str) -> None:
    error = error_of(client.post("/v1/completions", json=body), 400)
    assert part in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


WRONG_MESSAGES = [
    ([], "messages", "must hold at least 1, got 0"),
    ("hi", "messages", "must be a list"),
    (["hi"], "messages[0]", "must be an object"),
    ([{"content": "a"}], "messages[0].role", "is required"),
    ([{"role": "robot", "content": "a"}], "messages[0].role", "must be 'system'"),
    ([*USER, {"role": "user"}], "messages[1]", "needs content"),
    ([{"role": "user", "content": "a", "annotations": [{}]}], "messages[0]", "which only an assistant's message has"),
    ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages[0].content", "text part"),
    ([{"role": "user", "content": 5}], "messages[0].content", "must be a string or a list of parts"),
    ([{"role": "user", "content": []}], "messages[0].content", "at least one part"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "text part"),
    ([{"role": "user", "content": "a", "mood": "sad"}], "messages[0].mood", "unknown field"),
    ([{"role": "user", "content": "a", "tool_call_id": "x"}], "messages[0]", "tool_call_id"),
]


@pytest.mark.parametrize(
    ("messages", "param", "part"), WRONG_MESSAGES, ids=[str(i) for i in range(len(WRONG_MESSAGES))]
)
def test_a_wrong_message_is_named_with_its_place(client: TestClient, messages, param: str, part: str) -> None:
    error = error_of(client.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert part in error["message"]
    assert error["param"] == param


def test_objects_nested_deeply_are_refused(client: TestClient) -> None:
    nested: dict = {}
    for _ in range(100):
        nested = {"a": nested}
    for name in ("chat_template_kwargs", "metadata"):
        error = error_of(client.post("/v1/chat/completions", json={"messages": USER, name: nested}), 400)
        assert error["param"] == name


def test_an_error_never_sends_a_long_value_back(client: TestClient) -> None:
    for body in ({"prompt": "a", "temperature": "x" * 100_000}, {"prompt": "a", "y" * 100_000: 1}):
        response = client.post("/v1/completions", json=body)
        error_of(response, 400)
        assert len(response.content) < 2000


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", json={"model": "gpt-4", "prompt": "a"}), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "fake" in error["message"]


def test_an_unknown_route_is_not_found(client: TestClient) -> None:
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "route_not_found"
    error_of(client.get("/v1/models/"), 404)


def test_a_wrong_method_is_named_with_the_right_one(client: TestClient) -> None:
    response = client.get("/v1/completions")
    assert "use POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_taken(client: TestClient, content_type) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    error = error_of(client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers), 415)
    assert "application/json" in error["message"]


def test_a_charset_beside_the_content_type_is_fine(client: TestClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers).status_code == 200


def test_a_full_queue_says_when_to_come_back() -> None:
    client = TestClient(create_app(FakeEngine(error=QueueFullError("full", retry_after_s=7)), ServerSettings()))
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "7"


def test_a_request_that_failed_inside_the_engine_is_a_500_in_the_same_form() -> None:
    client = TestClient(create_app(FakeEngine(error=RequestFailedError("row failed")), ServerSettings()))
    assert error_of(client.post("/v1/completions", json={"prompt": "a"}), 500)["code"] == "request_failed"


def test_an_unforeseen_error_is_logged_with_the_request_id_and_tells_nothing(caplog) -> None:
    client = TestClient(create_app(FakeEngine(error=ValueError("secret")), ServerSettings()))
    response = client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "abc"})
    assert "secret" not in response.text
    assert error_of(response, 500)["code"] == "internal_error"
    assert response.headers["x-request-id"] == "abc"
    assert "abc failed: POST /v1/completions" in caplog.text


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (EngineState.STARTING, "engine_not_ready"),
        (EngineState.RESTARTING, "engine_not_ready"),
        (EngineState.DEAD, "engine_not_ready"),
        (EngineState.DRAINING, "server_draining"),
    ],
)
def test_requests_wait_for_a_ready_engine(state: EngineState, code: str) -> None:
    client = TestClient(create_app(FakeEngine(health=EngineHealth(state=state)), ServerSettings()))
    response = client.post("/v1/chat/completions", json={"messages": USER})
    assert error_of(response, 503)["code"] == code
    assert int(response.headers["retry-after"]) > 0


def test_more_sequences_than_the_queue_ever_holds_are_a_bad_request() -> None:
    client = TestClient(create_app(FakeEngine(max_queued_requests=4), ServerSettings()))
    body = {"model": "fake", "prompt": ["a", "b"], "max_tokens": 1}
    assert client.post("/v1/completions", json=body | {"n": 2}).status_code == 200
    error = error_of(client.post("/v1/completions", json=body | {"n": 3}), 400)
    assert error["param"] == "n"
    assert "2 prompts times n=3 are more than 4 sequences" in error["message"]
