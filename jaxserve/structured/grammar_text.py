"""From `StructuredOutputsParams` to a grammar's text as llguidance reads it. Nothing is compiled here."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import msgspec
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import MAX_CONSTRAINT_CHARS, StructuredOutputsParams

_ANY_OBJECT = {"type": "object"}


def grammar_text(params: StructuredOutputsParams) -> str:
    """The grammar of checked parameters; raises `InvalidRequestError` for what is no JSON and no grammar at all.

    >>> grammar_text(StructuredOutputsParams(choice=["yes", "no"]))
    'start: "yes" | "no"'
    """
    text = _WRITERS[params.constraint](params)
    if len(text) > 2 * MAX_CONSTRAINT_CHARS:  # JSON text may escape what its characters are
        raise _error(f"the constraint comes to {len(text)} characters, at most {2 * MAX_CONSTRAINT_CHARS} are taken")
    return text


def _from_json(params: StructuredOutputsParams) -> str:
    schema = _ANY_OBJECT if params.json_object else params.json
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _error(f"json is not the text of a JSON schema: {error}") from error
    if not isinstance(schema, dict):
        raise _error(f"a JSON schema must be an object, got {type(schema).__name__}")
    try:
        if params.disable_additional_properties:
            schema = _closed(schema)
        # Not llguidance's own x-guidance: a client's could lift limits and turn errors into silence.
        text = json.dumps(_without_options(schema), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError, TypeError) as error:
        raise _error(f"the JSON schema cannot be written as JSON: {error}") from error
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options = {"whitespace_pattern": params.whitespace_pattern}
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _closed(schema: Any) -> Any:
    """Objects with properties take no others, unless they say so themselves; as vLLM does it."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema or "patternProperties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _without_options(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_options(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: _without_options(value) for name, value in schema.items() if name != "x-guidance"}


def _from_choice(params: StructuredOutputsParams) -> str:
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in params.choice or ())


def _from_regex(params: StructuredOutputsParams) -> str:
    return llguidance.LLMatcher.grammar_from_regex(params.regex or "")


def _from_grammar(params: StructuredOutputsParams) -> str:
    try:
        return any_to_lark(params.grammar or "")
    except Exception as error:  # a recursive parser in Python: it raises whatever it stumbles over
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise _error(f"the grammar cannot be read: {reason}") from error


_WRITERS = {
    "json": _from_json,
    "json_object": _from_json,
    "choice": _from_choice,
    "regex": _from_regex,
    "grammar": _from_grammar,
}


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="structured_outputs")
