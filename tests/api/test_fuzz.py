"""Hostile bodies: never a 5xx, never anything but an answer or OpenAI's error form."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.app import create_app
from api.schemas import unsupported
from api.schemas.chat import ChatRequest
from api.schemas.completion import CompletionRequest
from api.schemas.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizePromptRequest
from jaxserve.config import ServerSettings
from tests.fakes import FakeEngine

CLIENT = TestClient(create_app(FakeEngine(), ServerSettings()))
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**40, 0.5, -0.0, 1e308, 5e-324]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["a", "\ud800", "\x00", "text", "user", "fake", "<|im_end|>", "é" * 50]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "5", "x", "function"]), inner, max_size=3),
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "x"])},
        optional={"content": VALUES, "tool_calls": VALUES},
    ),
    max_size=3,
)
SCHEMAS = {
    "/v1/completions": ([*CompletionRequest.model_fields, *unsupported.COMPLETION], {"prompt": "One"}),
    "/v1/chat/completions": (
        [*ChatRequest.model_fields, *unsupported.CHAT],
        {"messages": [{"role": "user", "content": "a"}]},
    ),
    "/tokenize": ([*TokenizePromptRequest.model_fields, *TokenizeChatRequest.model_fields], {"prompt": "a"}),
    "/detokenize": ([*DetokenizeRequest.model_fields], {"tokens": [5]}),
}


def check(path: str, data: bytes) -> None:
    response = CLIENT.post(path, content=data, headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(response.content) < 8000


@pytest.mark.parametrize("path", SCHEMAS)
@FUZZ
@given(data=st.data())
def test_any_values_in_known_fields(path: str, data: st.DataObject) -> None:
    names, valid = SCHEMAS[path]
    fields = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    if "messages" in names and data.draw(st.booleans()):
        fields["messages"] = data.draw(MESSAGES)
    check(path, json.dumps(valid | fields).encode())


@pytest.mark.parametrize("path", SCHEMAS)
@FUZZ
@given(body=st.one_of(VALUES, st.dictionaries(st.text(max_size=5), VALUES, max_size=3)))
def test_any_json(path: str, body) -> None:
    check(path, json.dumps(body).encode())


@FUZZ
@given(data=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_any_bytes(data: bytes) -> None:
    check("/v1/completions", data)


@FUZZ
@given(
    path=st.text("abc/.%20~-", max_size=20),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]),
)
def test_any_path_and_method(path: str, method: str) -> None:
    response = CLIENT.request(method, "http://testserver/v1/" + path, content=b"{}")
    assert response.status_code in (404, 405)
