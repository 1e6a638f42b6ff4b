"""The checker: what cannot be compiled is refused, however it fails, and the next grammar is checked as before."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from jaxserve.errors import InvalidRequestError
from jaxserve.structured.checker import GrammarChecker
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.structured.vocabulary import PERSON, TABLE

CHAIN = {f"x{i}": {"$ref": f"#/$defs/x{i + 1}"} for i in range(3000)} | {"x3000": {"type": "string"}}


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(lambda: TABLE, timeout_s=1.5)
    yield checker
    checker.close()


def check(checker: GrammarChecker, **constraint) -> None:
    checker.check(grammar_text(StructuredOutputsParams(**constraint).validate()))


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": PERSON},
        {"json": json.dumps(PERSON)},
        {"json_object": True},
        {"regex": "[a-z]+@[a-z]+"},
        {"choice": ["yes", "no"]},
        {"grammar": 'root ::= "a" | "b" root'},
        {"grammar": 'start: "a" | "b" start'},
    ],
)
def test_what_compiles_passes(checker, constraint):
    check(checker, **constraint)


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"json": {"type": "thing"}}, "Invalid type: thing"),
        ({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "http://example.org/schema"}}, "retrieving it failed"),
        ({"json": {"type": "string", "x-guidance": {"lenient": True}, "not": {}}}, "Unimplemented keys"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: )"}, "expecting rule"),
        ({"grammar": "start: other"}, "other"),
        # A stack that overflows, and a compiler that would take half a minute.
        ({"json": {"$ref": "#/$defs/x0", "$defs": CHAIN}}, "too large, or too deeply nested"),
        ({"json": {"type": "integer", "multipleOf": 300_210_000}}, "takes longer than 1.5 s"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(checker, constraint, reason):
    for _ in range(2):  # the second time from memory
        with pytest.raises(InvalidRequestError) as caught:
            check(checker, **constraint)
        assert reason in caught.value.message
        assert caught.value.param == "structured_outputs"
    check(checker, choice=["yes", reason])


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"json": "{"}, "not the text of a JSON schema"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": {"const": float("nan")}}, "cannot be written as JSON"),
        ({"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, "the grammar cannot be read"),
        ({"grammar": 'root ::= "a'}, "the grammar cannot be read"),
    ],
)
def test_what_is_no_grammar_at_all_is_refused_before(constraint, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        grammar_text(StructuredOutputsParams(**constraint).validate())


def nested(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"json": {}, "json_object": True}, "got json and json_object"),
        ({"json_object": False}, "got none"),
        ({"regex": 3}, "regex must be str, got int"),
        ({"json": [1]}, "json must be dict or str, got list"),
        ({"choice": []}, "at least one text"),
        ({"choice": ["a", ""]}, "no empty one"),
        ({"choice": ["a"] * 5000}, "at most 4096 texts"),
        ({"regex": "a" * 300_000}, "at most 262144 characters"),
        ({"json": nested(200)}, "more than 120 levels deep"),
    ],
)
def test_parameters_are_checked_without_a_grammar(fields, reason):
    with pytest.raises(InvalidRequestError, match=reason):
        StructuredOutputsParams(**fields).validate()
