"""Requests that are wrong: each gets a 4xx in OpenAI's form that names the field, and the server goes on."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.server import NAME

EOS = 2
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
PROMPT: dict[str, Any] = {"prompt": "Hello", "max_tokens": 2}
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}

# (field that the error must name, the values that are wrong for it), for completions and for chats.
WRONG_IN_BOTH: list[tuple[str, list[Any]]] = [
    ("model", ["no-such-model", "", 7, ["a"]]),
    ("max_tokens", [-1, 2**31, 10**30, 1.5, "5", True, [1], {}]),
    ("temperature", [-0.1, 101, 1e308, "hot", True, [0.5]]),
    ("top_p", [0, -1, 1.1, "x"]),
    ("top_k", [-2, 10**20, 1.5, "x"]),
    ("min_p", [-0.1, 1.1]),
    ("presence_penalty", [-2.1, 2.1, "x"]),
    ("frequency_penalty", [-2.1, 2.1, 10**400]),
    ("repetition_penalty", [0, -1, 101]),
    ("n", [0, -1, 129, 10**6, 10**20, 1.5, "2", True]),
    ("seed", [-(2**63) - 1, 2**64, 10**30, 1.5, "x"]),
    ("stop", ["", [""], ["x"] * 65, "x" * 1025, [1], 5, {"a": 1}]),
    ("stop_token_ids", [[-1], [49152], [10**12], ["a"], 5, [1.5], [1] * 65]),
    ("logit_bias", [{"x": 1}, {"-1": 1}, {"49152": 1}, {"5": 101}, {"5": "a"}, {"5": None}, [1], 5,
                    {str(token): 1 for token in range(1025)}]),
    ("allowed_token_ids", [[], [-1], [10**9], "x", [True]]),
    ("bad_words", [[""], "x", [5], ["x"] * 65, ["many words " * 30], ["x" * 200_000] * 64]),
    ("min_tokens", [-1, 3, 10**12, "x"]),
    ("prompt_logprobs", [-1, 21, 999, "x", True]),
    ("truncate_prompt_tokens", [0, -2, 10**12, "x"]),
    ("stream", ["yes", 1, {}]),
    ("stream_options", [{"include_usage": True}, 5, {"include_usage": "x"}, {"what": 1}]),
    ("ignore_eos", ["no", 0]),
    ("skip_special_tokens", ["no"]),
    ("cache_salt", ["", 5]),
    ("priority", ["high", 1.5]),
    ("request_id", ["", "a b", "x" * 129, "é", "a\r\nSet-Cookie: b=c"]),
    ("metadata", ["x", [1]]),
    ("temprature", [0.5]),  # unknown
    ("response_format", [5, {}, {"type": "yaml"}, {"type": "json_schema"},
                         {"type": "text", "json_schema": {"schema": {}}},
                         {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}},
                         {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}},
                         {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}]),
    ("structured_outputs", [5, {}, {"regex": "(a"}, {"regex": "a", "choice": ["b"]}, {"choice": []},
                            {"grammar": "start: ("}, {"json": "{"}, {"json_object": False},
                            {"structural_tag": "x"}, {"regex": "a" * 300_000}]),
    ("guided_json", [5, {"$ref": "#/$defs/none"}]),
    ("guided_regex", [5, "(?=a)b"]),
    ("guided_choice", ["yes", [""]]),
    ("guided_grammar", ['root ::= "a', "root ::= other"]),
    ("guided_whitespace_pattern", [" "]),  # without guided_json
    ("best_of", [3]),
    ("use_beam_search", [True]),
]  # fmt: skip
WRONG_IN_COMPLETIONS: list[tuple[str, list[Any]]] = [
    ("prompt", [None, "", [], [[]], 5, True, {}, [1.5], ["a", 5], ["a", [1]], [True], [None], ["a", ""], [-1], [49152],
                [[1], [10**30]], [504] * 600, [[504]] * 1025, "long " * 20000]),
    ("logprobs", [-1, 21, 999, "x", True, 1.5]),
    ("max_tokens", [0, 512, 10**6]),
    ("suffix", ["end"]),
    ("echo", ["x", 1]),
    ("messages", [[{"role": "user", "content": "Hi"}]]),
]  # fmt: skip
WRONG_IN_CHATS: list[tuple[str, list[Any]]] = [
    ("messages", [None, [], "Hi", {}, 5, [5], ["x"], [{}], [{"role": "user"}], [{"content": "x"}],
                  [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}],
                  [{"role": "user", "content": []}],
                  [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
                  [{"role": "user", "content": "x", "colour": "red"}],
                  [{"role": "user", "content": "word " * 600}], [{"role": "user", "content": "word " * 60_000}]]),
    ("logprobs", [5, "x"]),
    ("top_logprobs", [2]),  # without logprobs
    ("max_completion_tokens", [3, "x"]),  # 3: max_tokens says 2
    ("max_tokens", [512, 10**6]),
    ("tools", [[{"type": "function", "function": {"name": "f"}}]]),
    ("tool_choice", ["required"]),
    ("chat_template", ["{{ 1 }}"]),
    ("chat_template_kwargs", ["x", {"tokenize": True}]),
    ("add_generation_prompt", ["x"]),
    ("continue_final_message", [True]),
]  # fmt: skip


def cases() -> list[Any]:
    tables = [
        (COMPLETION, PROMPT, WRONG_IN_BOTH + WRONG_IN_COMPLETIONS),
        (CHAT, MESSAGES, WRONG_IN_BOTH + WRONG_IN_CHATS),
    ]
    return [
        pytest.param(path, good, field, value, id=f"{path.split('/')[2]}-{field}-{json.dumps(value)[:24]}")
        for path, good, table in tables
        for field, values in table
        for value in values
    ]


def check_error(reply: httpx.Response, *, names: str = "", status: int | None = None) -> dict[str, Any]:
    """The reply is a 4xx in OpenAI's form, and says which field is wrong."""
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text[:500])
    assert status is None or reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    assert reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 1100
    assert names in (error["param"] or "") or names in error["message"], error
    return error


@pytest.fixture(autouse=True, scope="module")
def still_serving(client):
    """After all of this the server answers as before, and keeps nothing of it."""
    before = client.completions.create(model=NAME, **PROMPT, temperature=0).choices[0].text
    yield
    assert client.completions.create(model=NAME, **PROMPT, temperature=0).choices[0].text == before


@pytest.mark.parametrize(("path", "good", "field", "value"), cases())
def test_a_wrong_value_is_refused_and_its_field_named(http, path, good, field, value):
    body = good | {field: value}
    data = json.dumps(body).encode()
    check_error(http.post(path, content=data, headers={"content-type": "application/json"}), names=field)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"a": 1,}', b"{'a': 1}",
        b'{"prompt": NaN}', b'{"temperature": Infinity}', b'{"prompt": "Hi", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "Hi"} {"prompt": "Ho"}', b"\x00", b'{"prompt": "Hi" "x"}',
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(http, path, data):
    check_error(http.post(path, content=data, headers={"content-type": "application/json"}), status=400)


@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/tokenize"])
def test_surrogates_never_reach_the_tokenizer(http, path):
    for text in (r"\ud800", r"a \udc00 b", r"\ud83d \ude00"):
        body = (
            f'{{"messages": [{{"role": "user", "content": "{text}"}}]}}' if path == CHAT else f'{{"prompt": "{text}"}}'
        )
        check_error(http.post(path, content=body.encode(), headers={"content-type": "application/json"}), status=400)


def test_a_body_of_17_megabytes_is_refused_whether_its_length_is_told_or_not(http):
    data = json.dumps({"prompt": "x" * 17_000_000}).encode()
    headers = {"content-type": "application/json"}

    def in_chunks():
        yield from (data[at : at + 65536] for at in range(0, len(data), 65536))

    check_error(http.post(COMPLETION, content=data, headers=headers), status=413)
    with suppress(httpx.WriteError):  # the server may close the door while we are still sending
        check_error(http.post(COMPLETION, content=in_chunks(), headers=headers), status=413)


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(http, content_type):
    reply = http.post(COMPLETION, content=json.dumps(PROMPT).encode(), headers={"content-type": content_type})
    check_error(reply, status=415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", COMPLETION, 405), ("POST", "/v1/models", 405), ("GET", "/nothing", 404), ("GET", "/v1/models/none", 404),
     ("POST", "/v1/embeddings", 404), ("DELETE", f"/v1/models/{NAME}", 405), ("GET", "/../etc/passwd", 404)],
)  # fmt: skip
def test_unknown_routes_and_methods_are_refused(http, method, path, status):
    check_error(http.request(method, path), status=status)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "model": "none"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
)
def test_the_token_routes_check_their_bodies(http, path, body, field):
    check_error(http.post(path, json=body), names=field)


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [EOS], "min_tokens": 2},
        {"allowed_token_ids": [504], "stop_token_ids": [504], "min_tokens": 2},
        {"allowed_token_ids": [504], "bad_words": ["The"]},
    ],
)
def test_rules_that_leave_no_token_are_refused(http, fields):
    check_error(http.post(COMPLETION, json=PROMPT | fields), names="allowed_token_ids", status=400)


IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"structured_outputs": {"choice": ["yes", "no"]}, "min_tokens": 4, "max_tokens": 4, "n": 2},
     "structured_outputs"),
    (COMPLETION, {"guided_choice": ["yes"], "bad_words": ["yes"]}, "guided_choice"),
    (COMPLETION, {"guided_regex": "a", "stop_token_ids": [81], "min_tokens": 3, "max_tokens": 4}, "guided_regex"),
    (CHAT, {"response_format": {"type": "json_object"}, "allowed_token_ids": [28]}, "response_format"),
    (COMPLETION, {"guided_regex": "(a{1000}){1000}", "max_tokens": 8}, "guided_regex"),
]  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "fields", "names"), IMPOSSIBLE, ids=[str(i) for i in range(len(IMPOSSIBLE))])
def test_rules_that_leave_no_token_on_the_way_are_the_requests_own_error(http, path, fields, names, is_streamed):
    """No sooner than a token is wanted does anybody know that none is left; a stream may have begun by then."""
    good = PROMPT if path == COMPLETION else MESSAGES
    reply = http.post(path, json=good | fields | {"stream": is_streamed})
    if reply.status_code == 200:
        assert is_streamed
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        error = json.loads(events[-1])["error"]
    else:
        error = check_error(reply, status=400)
    assert (error["type"], error["param"]) == ("invalid_request_error", names)
    assert "<" not in error["message"]


NAMED_AS_SENT: list[tuple[dict[str, Any], str]] = [
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"priority": 3}, "priority"),
]


@pytest.mark.parametrize(("fields", "name"), NAMED_AS_SENT, ids=[json.dumps(fields) for fields, _ in NAMED_AS_SENT])
def test_errors_name_fields_as_the_chat_sent_them(http, fields, name):
    error = check_error(http.post(CHAT, json={"messages": MESSAGES["messages"]} | fields), status=400)
    assert error["param"] == name
    assert name in error["message"]
    others = {"logprobs", "max_tokens", "structured_outputs"} - {name}
    assert not others & set(re.findall(r"\w+", error["message"])), error


def test_openai_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", **PROMPT)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="context_length_exceeded|tokens") as long:
        client.completions.create(model=NAME, prompt=[504] * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        list(client.chat.completions.create(model=NAME, messages=MESSAGES["messages"], temperature=-1, stream=True))


def test_values_at_their_limits_are_taken(client):
    limits = {
        "temperature": 100.0, "min_p": 1.0, "repetition_penalty": 100.0, "top_k": 2**31 - 1, "min_tokens": 2,
        "logit_bias": {"0": -100, "49151": 100}, "stop": ["x"] * 64, "stop_token_ids": [0, 49151],
        "prompt_logprobs": 20,
    }  # fmt: skip
    answer = client.completions.create(
        model=NAME, **PROMPT, top_p=1e-9, seed=2**64 - 1, presence_penalty=2, frequency_penalty=-2, logprobs=20,
        extra_body=limits,
    )  # fmt: skip
    assert 1 <= answer.usage.completion_tokens <= 2
