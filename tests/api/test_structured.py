"""Structured outputs in the API: every spelling gives the engine the same constraint, and errors name the field."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.fakes import FakeEngine

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETION: {"prompt": "Hi"},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
SAME = {
    "response_format": (FORMAT, StructuredOutputsParams(json=SCHEMA)),
    "structured_outputs": ({"json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    "guided_json": (SCHEMA, StructuredOutputsParams(json=SCHEMA)),
    "guided_regex": ("a+", StructuredOutputsParams(regex="a+")),
    "guided_choice": (["a", "b"], StructuredOutputsParams(choice=["a", "b"])),
    "guided_grammar": ('root ::= "a"', StructuredOutputsParams(grammar='root ::= "a"')),
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("name", "value", "wanted"), [(name, *case) for name, case in SAME.items()])
def test_every_spelling_reaches_the_engine(client: TestClient, engine: FakeEngine, path, name, value, wanted):
    reply = client.post(path, json=BODIES[path] | {name: value})
    assert reply.status_code == 200, reply.text
    assert engine.calls[-1].params.structured_outputs == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, StructuredOutputsParams(regex="a")),
        (
            {"guided_json": "{}", "guided_whitespace_pattern": " "},
            StructuredOutputsParams(json="{}", whitespace_pattern=" "),
        ),
        (
            {
                "structured_outputs": {
                    "json": SCHEMA,
                    "disable_any_whitespace": True,
                    "disable_additional_properties": True,
                }
            },
            StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True, disable_additional_properties=True),
        ),
        ({}, None),
    ],
)
def test_options_go_with_their_constraint(client: TestClient, engine: FakeEngine, fields, wanted):
    assert client.post(CHAT, json=BODIES[CHAT] | fields).status_code == 200
    assert engine.calls[-1].params.structured_outputs == wanted


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "response_format and guided_regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must have json_schema.schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got regex and choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"guided_choice": [""]}, "guided_choice", "no empty one"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "guided_json"),
    ],
)
def test_what_is_wrong_is_refused_with_the_field_s_name(client: TestClient, fields, param, reason):
    reply = client.post(CHAT, json=BODIES[CHAT] | fields)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert param in (error["param"] or "")
    assert reason in error["message"]


def test_a_grammar_the_engine_refuses_is_the_fault_of_the_field_it_came_from(client: TestClient, engine: FakeEngine):
    engine.error = InvalidRequestError("cannot be compiled", param="structured_outputs", code="invalid_grammar")
    error = client.post(CHAT, json=BODIES[CHAT] | {"response_format": FORMAT}).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_grammar")
